"""Metrics as lines of JSON, for scripts and for the report: `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from llmft_core import Options, Tracker, hookimpl

llmft_api = 1


class Jsonl(Tracker):
    """One object a line: `{"step": 7, "time": 1.7e9, "train/loss": 2.5}`, `time` in seconds since 1970.

    JSON has no NaN and no infinity. Such a number is `null`, and `"non_finite": {"train/loss": "nan"}` (or "inf",
    "-inf") in the same line says what it was: columns stay numbers, and nothing is lost.
    """

    name = "jsonl"
    summary = "metrics.jsonl: one JSON object a line"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._file: IO[str] | None = None

    def start(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Opens `metrics.jsonl`, and appends where a resumed run finds one."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _drop_half_line(path)
        self._file = path.open("a", encoding="utf-8")

    def resume(self, folder: Path, plan: Mapping[str, Any], step: int) -> None:
        """Cuts the lines of later steps off."""
        self.start(folder, plan)
        path = folder / "metrics.jsonl"
        with path.open(encoding="utf-8") as file:
            kept = [line for line in file if json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes and flushes one line. Raises RuntimeError before `start`."""
        if self._file is None:
            raise RuntimeError("jsonl: log() was called before start()")
        numbers = {name: float(value) for name, value in metrics.items()}
        line: dict[str, Any] = {"step": step, "time": time.time()}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if odd := {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}:
            line["non_finite"] = odd
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _drop_half_line(path: Path) -> None:
    """A process that was killed may have left half a line at the end: without it every line is JSON again."""
    if path.exists():
        written = path.read_bytes()
        if not written.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(written.rfind(b"\n") + 1)


@hookimpl
def llmft_trackers() -> list[type[Tracker]]:
    """Lines of JSON."""
    return [Jsonl]
