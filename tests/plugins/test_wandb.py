"""The wandb tracker, offline: what it writes is read back; W&B itself is not asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_file import configuration, history, records

from llmft_plugins.trackers.wandb import STEP, Wandb, WandbOptions

PLAN = {"name": "x", "lr": 1e-4, "dataset": {"name": "arithmetic"}, "workers": 2}
KEY = "0123456789abcdef" * 2 + "01234567"


def offline(**options: object) -> Wandb:
    return Wandb(WandbOptions(mode="offline", **options))


def files(folder: Path) -> list[Path]:
    """The run's files, in the order in which they were begun."""
    return sorted(folder.glob("wandb/*/*.wandb"))


def test_metrics_and_plan_are_in_the_file(tmp_path: Path) -> None:
    tracker = offline(project="p", group="g", tags=["a", "b"])
    tracker.start(tmp_path, PLAN)
    tracker.log({"train/loss": 2.5, "eval/perplexity": 12.0}, step=3)
    tracker.log({"train/loss": 2.25}, step=4)
    tracker.finish()
    (file,) = files(tmp_path)
    first, second = history(file)
    assert (first[STEP], first["train/loss"], first["eval/perplexity"]) == (3, 2.5, 12.0)
    assert (second[STEP], second["train/loss"]) == (4, 2.25)
    assert configuration(file)["plan"] == PLAN
    run = next(record.run for record in records(file) if record.HasField("run"))
    assert (run.project, run.run_group, list(run.tags), run.display_name) == ("p", "g", ["a", "b"], "x")
    assert json.loads((tmp_path / "wandb" / "run.json").read_text()) == {"id": run.run_id}


@pytest.mark.parametrize(("by_user", "codes"), [(None, [0]), (True, [1]), (False, [1])])
def test_a_run_that_was_broken_off_is_shown_as_failed(tmp_path: Path, by_user: bool | None, codes: list[int]) -> None:
    tracker = offline()
    tracker.start(tmp_path, PLAN)
    tracker.log({"train/loss": 2.5}, step=1)
    if by_user is None:
        tracker.finish()
    else:
        tracker.break_off(by_user=by_user)
    (file,) = files(tmp_path)
    assert [record.exit.exit_code for record in records(file) if record.HasField("exit")] == codes
    assert [line[STEP] for line in history(file)] == [1]


def test_all_charts_are_drawn_over_the_optimizer_step(tmp_path: Path) -> None:
    tracker = offline()
    tracker.start(tmp_path, PLAN)
    tracker.finish()
    (file,) = files(tmp_path)
    metrics = [record.metric for record in records(file) if record.HasField("metric")]
    assert [(metric.name, metric.glob_name, metric.step_metric) for metric in metrics] == [
        (STEP, "", ""),
        ("", "*", STEP),
    ]


def test_a_resumed_run_keeps_its_id_also_on_another_machine(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    tracker = offline()
    tracker.start(here, PLAN)
    tracker.log({"train/loss": 2.5}, step=1)
    tracker.log({"train/loss": 2.0}, step=2)
    tracker.finish()
    (before,) = files(here)
    there.joinpath("wandb").mkdir(parents=True)  # what storage gives back: files alone
    there.joinpath("wandb", "run.json").write_bytes((here / "wandb" / "run.json").read_bytes())
    resumed = offline()
    resumed.resume(there, {**PLAN, "workers": 1}, step=1)
    resumed.log({"train/loss": 2.0}, step=2)
    resumed.finish()
    (after,) = files(there)
    ids = [next(record.run.run_id for record in records(file) if record.HasField("run")) for file in (before, after)]
    assert ids[0] == ids[1]
    assert [line[STEP] for line in history(after)] == [2]
    assert configuration(after)["plan"]["workers"] == 1


def test_a_run_that_was_not_tracked_before_gets_a_new_id(tmp_path: Path) -> None:
    tracker = offline()
    tracker.resume(tmp_path, PLAN, step=7)
    tracker.log({"train/loss": 2.0}, step=8)
    tracker.finish()
    assert [line[STEP] for line in history(files(tmp_path)[0])] == [8]
    assert json.loads((tmp_path / "wandb" / "run.json").read_text())["id"]


def test_no_file_holds_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = offline()
    tracker.start(tmp_path, PLAN)
    tracker.log({"train/loss": 2.5}, step=1)
    tracker.finish()
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) >= 3
    assert [file.name for file in written if KEY.encode() in file.read_bytes()] == []


def test_what_was_logged_before_a_kill_is_in_the_file(tmp_path: Path) -> None:
    program = f"""
import os, signal, time
from pathlib import Path
from llmft_plugins.trackers.wandb import Wandb, WandbOptions
tracker, folder = Wandb(WandbOptions(mode="offline")), Path({str(tmp_path)!r})
tracker.start(folder, {PLAN!r})
for step in range(1, 4):
    tracker.log({{"train/loss": 1.0 / step}}, step=step)
(file,) = folder.glob("wandb/*/*.wandb")
deadline, size = time.monotonic() + 60, -1
while b"0.3333" not in file.read_bytes():  # wandb's own process writes it, by and by
    assert time.monotonic() < deadline, "the last step was never written"
    time.sleep(0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (file,) = files(tmp_path)
    assert [line[STEP] for line in history(file)] == [1, 2, 3]


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody is logged in; the file that would say so."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_online_without_a_key_is_refused_before_the_run(nobody: Path) -> None:
    (problem,) = Wandb(WandbOptions()).problems()
    assert str(problem) == (
        "tracker: wandb knows no API key: set WANDB_API_KEY, run `wandb login`, or choose `mode: offline`"
    )
    assert offline().problems() == []


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_key_in_the_environment_will_do(nobody: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, KEY)
    assert Wandb(WandbOptions()).problems() == []


def test_a_login_will_do(nobody: Path) -> None:
    nobody.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    nobody.chmod(0o600)
    assert Wandb(WandbOptions()).problems() == []
    nobody.write_text(f"machine another.example\n  login user\n  password {KEY}\n")
    assert len(Wandb(WandbOptions()).problems()) == 1


def test_the_environment_chooses_the_mode_where_the_plan_does_not(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert Wandb(WandbOptions()).problems() == []
    assert len(Wandb(WandbOptions(mode="online")).problems()) == 1
