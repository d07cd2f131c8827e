"""A run whose loss is not a number in one step: it stops there, and goes on without that step where it is told to."""

from __future__ import annotations

import json
from pathlib import Path

from command import Answer, altered_llmft

SPOILED = """
from llmft_core.train import loop

real, passes = loop.micro_batch_loss, iter(range(1000))
loop.micro_batch_loss = lambda *args: real(*args) * (float("nan") if next(passes) == WRONG else 1.0)
"""
FLAGS = ["--workers", "0", "--dataset.rows", "24", "--dataset.test-rows", "8", "--global-batch", "4"]
FLAGS += ["--micro-batch", "2", "--state.every-steps", "2"]


def spoiled(folder: Path, wrong: int, *command: str) -> Answer:
    """`llmft COMMAND`, in which forward pass `wrong` (from 0) has no number for a loss; two passes are a step."""
    return altered_llmft(f"WRONG = {wrong}\n{SPOILED}", *command, folder=folder)


def test_a_run_stops_at_such_a_step_and_can_be_taken_past_it(tmp_path: Path) -> None:
    straight = spoiled(tmp_path, 7, "run", *FLAGS, "--name", "straight", "--on-nonfinite", "skip:1")
    assert straight.code == 0, straight.err
    warning = "warning: optimizer step 4 is not applied on any rank: loss nan, gradient norm nan; not finite: "
    assert warning in straight.out
    assert "; 1 of 1 such steps that --on-nonfinite allows" in straight.out
    assert "\n1 optimizer step not applied: loss or gradient not finite\n" in straight.out

    stopped = spoiled(tmp_path, 7, "run", *FLAGS, "--name", "stopped")
    run = tmp_path / "llmft-runs" / "runs" / "stopped"
    rows = run / "aside" / "step_00004_nonfinite.jsonl"
    assert stopped.code == 1, stopped.err
    (error,) = [line for line in stopped.err.splitlines() if line.startswith("llmft: error")]
    assert error.startswith("llmft: error: optimizer step 4 is not applied on any rank: loss nan, gradient norm nan")
    assert f"; not finite: micro-batch 1 of rank 0; the rows are in {rows}: look at these rows" in error
    assert f"--on-nonfinite skip:3; `llmft resume {run}` goes on from state_00000" in error
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["micro_batch"] for line in lines] == [1, 1, 0, 0]
    assert [line["loss"] for line in lines[:2]] == ["nan", "nan"]
    for line in lines:
        assert line["file"].startswith("arithmetic")
        assert "<START_Q>" in line["text"]

    # The resumed run begins with step 3 of 6, so the wrong pass is its fourth.
    resumed = spoiled(tmp_path, 3, "resume", str(run), "--on-nonfinite", "skip:1")
    assert resumed.code == 0, resumed.err
    assert warning in resumed.out
    folders = [run.with_name("straight"), run]
    weights = [sorted(folder.glob("checkpoint_*/model.safetensors"))[-1].read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    metrics = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    assert [[line["train/skipped"] for line in of_run] for of_run in metrics] == [[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]] * 2
    manifest = json.loads(sorted(run.glob("state_*/progress.json"))[-1].read_text())
    assert (manifest["step"], manifest["guards"]["skipped"]) == (4, 1)
