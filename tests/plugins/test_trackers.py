"""The trackers that ship: what they write."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from llmft_core import Options
from llmft_plugins.trackers.jsonl import Jsonl
from llmft_plugins.trackers.tensorboard import TensorBoard

PLAN = {"name": "x", "lr": 1e-4}


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """Every line as JSON by the letter: NaN and Infinity are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_jsonl_writes_each_line_at_once(tmp_path: Path) -> None:
    tracker = Jsonl(Options())
    before = time.time()
    tracker.start(tmp_path / "new" / "folder", PLAN)
    tracker.log({"train/loss": 2.5, "train/tokens": 100}, step=7)
    (line,) = strict_lines(tmp_path / "new" / "folder" / "metrics.jsonl")  # before finish: a killed run keeps it
    assert line.pop("time") >= before
    assert line == {"step": 7, "train/loss": 2.5, "train/tokens": 100}
    tracker.finish()


def test_jsonl_stays_json_whatever_the_numbers(tmp_path: Path) -> None:
    tracker = Jsonl(Options())
    tracker.start(tmp_path, PLAN)
    tracker.log({"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 1.0}, step=1)
    tracker.finish()
    (line,) = strict_lines(tmp_path / "metrics.jsonl")
    assert [line[name] for name in "abcd"] == [None, None, None, 1.0]
    assert line["non_finite"] == {"a": "nan", "b": "inf", "c": "-inf"}


def test_jsonl_takes_numbers_of_numpy_and_torch(tmp_path: Path) -> None:
    import numpy as np
    import torch

    tracker = Jsonl(Options())
    tracker.start(tmp_path, PLAN)
    tracker.log({"numpy": np.float32(0.5), "torch": torch.tensor(0.25)}, step=1)  # type: ignore[dict-item]
    tracker.finish()
    assert strict_lines(tmp_path / "metrics.jsonl")[0]["torch"] == 0.25


def test_jsonl_of_a_resumed_run_drops_half_a_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tr')
    tracker = Jsonl(Options())
    tracker.start(tmp_path, PLAN)
    tracker.log({}, step=2)
    tracker.finish()
    assert [line["step"] for line in strict_lines(path)] == [1, 2]


@pytest.mark.parametrize("tracker_type", [Jsonl, TensorBoard])
def test_logging_before_the_start_is_an_error(tracker_type: Any) -> None:
    with pytest.raises(RuntimeError, match="before start"):
        tracker_type(Options()).log({"a": 1.0}, step=1)


def test_tensorboard_writes_scalars_and_the_plan(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard(Options())
    tracker.start(tmp_path, PLAN)
    tracker.log({"train/loss": 2.5, "eval/perplexity": 12.0}, step=3)
    tracker.log({"train/loss": 2.25}, step=4)
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 2.5), (4, 2.25)]
    assert [event.value for event in events.Scalars("eval/perplexity")] == [12.0]
    assert "plan/text_summary" in events.Tags()["tensors"]
