"""MLflow: metrics and the plan as a run on a tracking server, or in an SQLite file in the run's folder."""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from llmft_core import Options, Problem, Tracker, hookimpl

llmft_api = 1

LONGEST_VALUE = 6000
"""Characters of a parameter's value that MLflow takes."""
PARAMETERS_AT_ONCE = 100
"""Parameters that MLflow takes in one request."""
METRICS_AT_ONCE = 1000
"""Metrics that MLflow takes in one request."""
COPY_SECONDS = 10.0
"""Shortest time between two copies of the SQLite file."""
COPY_SHARE = 0.05
"""Share of the time that may go into such copies."""
FINISH_SECONDS = 300.0
"""Longest wait at the end for what has not been sent."""

Point = tuple[dict[str, float], int, int]
"""Metrics, optimizer step, ms since 1970."""


class MlflowOptions(Options):
    """No secret is among them: a server's user and password or token come from MLFLOW_TRACKING_USERNAME,
    MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN."""

    uri: str = Field(
        "", description="tracking server; default: MLFLOW_TRACKING_URI, else mlflow/mlflow.db in the run's folder"
    )
    experiment: str = Field("llmft", min_length=1, description="experiment that the run belongs to")

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, value: str) -> str:
        if urlsplit(value).password is not None:
            raise ValueError("it holds a password, which would be stored with the plan: set MLFLOW_TRACKING_URI")
        return value


class Mlflow(Tracker):
    """A run of MLflow under the plan's name, its id in `mlflow/run.json` of the run's folder: `llmft resume` goes on
    with it. Steps that are done again after a resume are in the metric's history twice, with the same numbers.

    A thread of its own speaks to the store: neither a new database (seconds) nor a slow server holds anything up.
    """

    name = "mlflow"
    summary = "MLflow, on a server or in an SQLite file (pip install 'llmft[mlflow]')"
    options_type = MlflowOptions

    def __init__(self, options: MlflowOptions) -> None:
        super().__init__(options)
        self._sender: Sender | None = None

    def problems(self) -> list[Problem]:
        """Without the packages the run would be watched by nobody."""
        needed = ("mlflow",) if self._uri else ("mlflow", "sqlalchemy", "alembic")
        missing = [package for package in needed if find_spec(package) is None]
        if missing:
            return [Problem("tracker", f"{' and '.join(missing)} not installed: pip install 'llmft[mlflow]'")]
        return []

    @property
    def _uri(self) -> str:
        return str(self.options.uri) or os.environ.get("MLFLOW_TRACKING_URI", "")

    def start(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """A new run, with the plan's leaves as parameters (`plan.lr`)."""
        self._open(folder, plan, None)

    def resume(self, folder: Path, plan: Mapping[str, Any], step: int) -> None:
        """The run that the folder tells of; a new one where it was not tracked here before."""
        note = folder / "mlflow" / "run.json"
        self._open(folder, plan, json.loads(note.read_text(encoding="utf-8"))["id"] if note.exists() else None)

    def _open(self, folder: Path, plan: Mapping[str, Any], run_id: str | None) -> None:
        (folder / "mlflow").mkdir(parents=True, exist_ok=True)
        store = Server(self._uri) if self._uri else LocalFile(folder)
        self._sender = Sender(store, folder / "mlflow" / "run.json", self.options.experiment, plan, run_id)
        self._sender.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands one point to the thread. Raises what the thread met since, RuntimeError before `start`."""
        if self._sender is None:
            raise RuntimeError("mlflow: log() was called before start()")
        self._sender.put(({name: float(value) for name, value in metrics.items()}, step, int(time.time() * 1000)))

    def finish(self) -> None:
        """Waits until all is in the store. Raises what the thread met, TimeoutError after five minutes."""
        self._close("FINISHED")

    def break_off(self, *, by_user: bool) -> None:
        """As `finish`; the run's status is KILLED or FAILED."""
        self._close("KILLED" if by_user else "FAILED")

    def _close(self, status: str) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.finish(status)


class Server:
    """A tracking server, or a database that the user looks after."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def keep(self, *, now: bool = False) -> None:
        """It keeps what it gets."""

    def close(self) -> None:
        """Nothing is held."""


class LocalFile:
    """An SQLite file in the folder `mlflow` of the run's. The database itself lies beside the run's folder, and whole
    copies of it in there: a database that is being written, copied to storage, would be none. (MLflow's store of plain
    files takes no new features any more.)"""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "mlflow" / "mlflow.db"
        self._scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-mlflow-", dir=folder.parent))
        self._database = self._scratch / "mlflow.db"
        if self._path.exists():
            shutil.copyfile(self._path, self._database)
        self.uri = f"sqlite:///{self._database}"
        self._next = 0.0

    def keep(self, *, now: bool = False) -> None:
        """Copy the database, unless that was done lately."""
        began = time.monotonic()
        if not now and began < self._next:
            return
        copy = self._scratch / "copy.db"
        with closing(sqlite3.connect(self._database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        copy.replace(self._path)
        ended = time.monotonic()
        self._next = ended + max(COPY_SECONDS, (ended - began) / COPY_SHARE)

    def close(self) -> None:
        """The copy in the run's folder is all that stays."""
        shutil.rmtree(self._scratch, ignore_errors=True)


class Sender(threading.Thread):
    """Opens the store and the run, and writes points in the order in which they come."""

    def __init__(
        self, store: Server | LocalFile, note: Path, experiment: str, plan: Mapping[str, Any], run_id: str | None
    ) -> None:
        super().__init__(name="llmft-mlflow", daemon=True)
        self._store, self._note, self._experiment, self._plan = store, note, experiment, plan
        self._run_id = run_id
        self._points: queue.Queue[Point | None] = queue.Queue()
        self._failure: Exception | None = None
        self._status = "FINISHED"

    def put(self, point: Point) -> None:
        """Raises what the thread met."""
        if self._failure is not None:
            raise self._failure
        self._points.put(point)

    def finish(self, status: str) -> None:
        """Wait for the end; the run gets this status of MLflow's. Raises what the thread met, TimeoutError."""
        self._status = status
        self._points.put(None)
        self.join(FINISH_SECONDS)
        if self.is_alive():
            raise TimeoutError(f"{self._store.uri} did not take everything within {FINISH_SECONDS:.0f} s")
        if self._failure is not None:
            raise self._failure

    def run(self) -> None:
        try:
            client, run_id = self._opened()
            ended = False
            while not ended:
                points = [self._points.get()]
                while not self._points.empty():
                    points.append(self._points.get())
                ended = points[-1] is None
                self._write(client, run_id, [point for point in points if point is not None])
                self._store.keep()
            client.set_terminated(run_id, status=self._status)
            self._store.keep(now=True)
        except Exception as error:  # noqa: BLE001 - raised again in the thread that logs
            self._failure = error
        finally:
            self._store.close()

    def _opened(self) -> tuple[Any, str]:
        """A client, and the id of the run."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
        client = MlflowClient(self._store.uri)
        if self._run_id is None:
            known = client.get_experiment_by_name(self._experiment)
            experiment = client.create_experiment(self._experiment) if known is None else known.experiment_id
            name = str(self._plan.get("name") or "") or None
            self._run_id = str(client.create_run(experiment, run_name=name).info.run_id)
            self._write_parameters(client, self._run_id)
        else:
            client.update_run(self._run_id, status="RUNNING")
        self._store.keep(now=True)
        self._note.write_text(json.dumps({"id": self._run_id}) + "\n", encoding="utf-8")
        return client, self._run_id

    def _write_parameters(self, client: Any, run_id: str) -> None:
        from mlflow.entities import Param

        found = [Param(f"plan.{path}", value[:LONGEST_VALUE]) for path, value in leaves(self._plan)]
        for start in range(0, len(found), PARAMETERS_AT_ONCE):
            client.log_batch(run_id, params=found[start : start + PARAMETERS_AT_ONCE])

    def _write(self, client: Any, run_id: str, points: list[Point]) -> None:
        from mlflow.entities import Metric

        found = [
            Metric(name, value, milliseconds, step)
            for metrics, step, milliseconds in points
            for name, value in metrics.items()
        ]
        for start in range(0, len(found), METRICS_AT_ONCE):
            client.log_batch(run_id, metrics=found[start : start + METRICS_AT_ONCE])


def leaves(plan: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The plan's values by dotted path, as text."""
    for name, value in plan.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}.")
        else:
            yield path, value if isinstance(value, str) else json.dumps(value, default=str)


@hookimpl
def llmft_trackers() -> list[type[Tracker]]:
    """MLflow."""
    return [Mlflow]
