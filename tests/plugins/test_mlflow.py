"""The mlflow tracker on its local store, read back with MLflow's own client."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmft_plugins.trackers.mlflow import LONGEST_VALUE, Mlflow, MlflowOptions

PLAN = {"name": "x", "lr": 1e-4, "dataset": {"name": "arithmetic", "files": ["a", "b"]}, "note": "n" * 7000}


def read(database: Path) -> tuple[Any, Any]:
    """MLflow's client of a database, and its one run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    ids = [experiment.experiment_id for experiment in client.search_experiments(filter_string="name != 'Default'")]
    (run,) = client.search_runs(ids)
    return client, run


def history(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, as they were logged."""
    points = client.get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: (point.timestamp, point.step))]


def test_metrics_and_plan_are_in_the_database(tmp_path: Path) -> None:
    tracker = Mlflow(MlflowOptions(experiment="mine"))
    tracker.start(tmp_path / "run", PLAN)
    tracker.log({"train/loss": 2.5, "eval/perplexity": 12.0}, step=3)
    tracker.log({"train/loss": 2.25}, step=4)
    tracker.finish()
    client, run = read(tmp_path / "run" / "mlflow" / "mlflow.db")
    assert history(client, run, "train/loss") == [(3, 2.5), (4, 2.25)]
    assert history(client, run, "eval/perplexity") == [(3, 12.0)]
    assert run.data.params == {
        "plan.name": "x",
        "plan.lr": "0.0001",
        "plan.dataset.name": "arithmetic",
        "plan.dataset.files": '["a", "b"]',
        "plan.note": "n" * LONGEST_VALUE,
    }
    assert (run.info.run_name, run.info.status) == ("x", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "mine"
    assert json.loads((tmp_path / "run" / "mlflow" / "run.json").read_text()) == {"id": run.info.run_id}


@pytest.mark.parametrize(("by_user", "status"), [(True, "KILLED"), (False, "FAILED")])
def test_a_run_that_was_broken_off_says_so_until_it_goes_on(tmp_path: Path, by_user: bool, status: str) -> None:
    tracker = Mlflow(MlflowOptions())
    tracker.start(tmp_path, PLAN)
    tracker.log({"train/loss": 2.5}, step=1)
    tracker.break_off(by_user=by_user)
    client, run = read(tmp_path / "mlflow" / "mlflow.db")
    assert (run.info.status, history(client, run, "train/loss")) == (status, [(1, 2.5)])
    resumed = Mlflow(MlflowOptions())
    resumed.resume(tmp_path, PLAN, step=1)
    resumed.finish()
    again = tmp_path / "again.db"  # MLflow keeps a connection to the file that was read above
    shutil.copyfile(tmp_path / "mlflow" / "mlflow.db", again)
    assert read(again)[1].info.status == "FINISHED"


def test_nothing_is_left_but_the_database(tmp_path: Path) -> None:
    tracker = Mlflow(MlflowOptions())
    tracker.start(tmp_path / "run", PLAN)
    tracker.log({"train/loss": 2.5}, step=1)
    tracker.finish()
    names = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert names == {"run/mlflow/mlflow.db", "run/mlflow/run.json"}


def test_a_resumed_run_goes_on_on_another_machine(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    tracker = Mlflow(MlflowOptions())
    tracker.start(here, PLAN)
    for step, loss in enumerate((2.5, 2.0, 1.5), start=1):
        tracker.log({"train/loss": loss}, step=step)
    tracker.finish()
    shutil.copytree(here, there)
    resumed = Mlflow(MlflowOptions())
    resumed.resume(there, {**PLAN, "workers": 1}, step=2)
    resumed.log({"train/loss": 1.5}, step=3)
    resumed.log({"train/loss": 1.0}, step=4)
    resumed.finish()
    client, run = read(there / "mlflow" / "mlflow.db")
    assert history(client, run, "train/loss") == [(1, 2.5), (2, 2.0), (3, 1.5), (3, 1.5), (4, 1.0)]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == 1.0


def test_a_run_that_was_not_tracked_before_begins_there(tmp_path: Path) -> None:
    tracker = Mlflow(MlflowOptions())
    tracker.resume(tmp_path / "run", PLAN, step=7)
    tracker.log({"train/loss": 2.0}, step=8)
    tracker.finish()
    assert history(*read(tmp_path / "run" / "mlflow" / "mlflow.db"), "train/loss") == [(8, 2.0)]


def test_a_kill_leaves_a_whole_database(tmp_path: Path) -> None:
    program = f"""
import os, signal, sqlite3, time
from contextlib import closing
from pathlib import Path
from llmft_plugins.trackers import mlflow as module
module.COPY_SECONDS, module.COPY_SHARE = 0.0, 1.0
tracker, folder = module.Mlflow(module.MlflowOptions()), Path({str(tmp_path / "run")!r})
tracker.start(folder, {PLAN!r})
database, deadline = folder / "mlflow" / "mlflow.db", time.monotonic() + 100
while not database.exists():
    assert time.monotonic() < deadline, "no database"
    time.sleep(0.05)
def copied():
    with closing(sqlite3.connect(database)) as copy:
        return copy.execute("select max(step) from metrics").fetchone()[0] or 0
step = 0
while step < 50 or copied() < 2:
    step += 1
    tracker.log({{"train/loss": 1.0 / step}}, step=step)
    time.sleep(0.01)
    assert time.monotonic() < deadline, "it is not copied"
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = Mlflow(MlflowOptions())
    resumed.resume(tmp_path / "run", PLAN, step=2)
    resumed.log({"train/loss": 7.0}, step=3)
    resumed.finish()
    points = history(*read(tmp_path / "run" / "mlflow" / "mlflow.db"), "train/loss")
    assert points[:2] == [(1, 1.0), (2, 0.5)]
    assert points[-1] == (3, 7.0)


def test_a_server_that_is_not_there_is_told_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmft_core.report.trackers import Trackers

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []
    trackers = Trackers([Mlflow(MlflowOptions(uri="http://127.0.0.1:9"))], warnings.append)
    trackers.start(tmp_path, PLAN)
    trackers.log({"train/loss": 2.5}, step=1)
    trackers.finish()
    (warning,) = warnings
    assert warning.startswith("tracker mlflow stopped: ")
    assert warning.endswith("the run goes on without it")
    assert "127.0.0.1" in warning


def test_no_password_gets_into_the_plan() -> None:
    with pytest.raises(ValidationError, match="set MLFLOW_TRACKING_URI"):
        MlflowOptions(uri="https://me:secret@example.org")
    assert MlflowOptions(uri="https://example.org").uri == "https://example.org"


def test_the_environment_names_the_server_where_the_plan_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'theirs.db'}")
    tracker = Mlflow(MlflowOptions())
    tracker.start(tmp_path / "run", PLAN)
    tracker.log({"train/loss": 2.5}, step=1)
    tracker.finish()
    assert history(*read(tmp_path / "theirs.db"), "train/loss") == [(1, 2.5)]
    assert not (tmp_path / "run" / "mlflow" / "mlflow.db").exists()


def test_what_is_not_installed_is_said_before_the_run() -> None:
    """A Python that sees neither package, as after a plain `pip install llmft`."""
    program = """
import sys
sys.modules.update(dict.fromkeys(("mlflow", "alembic", "wandb")))
from llmft_plugins.trackers.mlflow import Mlflow, MlflowOptions
from llmft_plugins.trackers.wandb import Wandb, WandbOptions
for tracker in (Mlflow(MlflowOptions()), Wandb(WandbOptions())):
    print(*tracker.problems())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "tracker: mlflow and alembic not installed: pip install 'llmft[mlflow]'",
        "tracker: wandb is not installed: pip install 'llmft[wandb]'",
    ], done.stderr
