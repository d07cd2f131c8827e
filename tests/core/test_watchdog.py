"""A rank that hangs is found, told apart from those that wait for it, and ended."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import altered_llmft
from guarding import VOCABULARY
from hanging_ranks import hang
from tables import tiny_llama
from training import Recorder

from llmft_core.train.hanging import hanging
from llmft_core.train.watchdog import PATIENCE_SECONDS, Watchdog


@pytest.mark.parametrize("strategy", ["ddp", "zero-3"])
def test_the_rank_that_hangs_is_named_and_its_stack_is_shown(strategy: str, tmp_path: Path) -> None:
    """Under ZeRO-3 the other one waits in the middle of the same forward pass; under DDP in the backward pass."""
    base = str(tiny_llama(tmp_path / "base", VOCABULARY))
    case = {"strategy": strategy, "precision": "fp32", "base": base, "world_size": 2, "steps": 8}
    codes, reports = hang(case, tmp_path, seconds=8)
    assert codes == [1, 1]
    assert {report["rank"] for report in reports} == {0, 1}
    of_rank = {report["rank"]: report for report in reports}
    assert (of_rank[1]["step"], of_rank[1]["doing"]) == (4, "the forward pass of micro-batch 0")
    assert (of_rank[0]["waiting"], of_rank[1]["waiting"]) == (True, False)
    assert re.fullmatch(r"stand_still \(.*hanging_ranks\.py:\d+\)", of_rank[1]["at"])
    first, others = of_rank[1]["stack"].split("\n\n", 1)
    assert first.startswith("the thread that trains MainThread, innermost call last:\n")
    assert first.rstrip().endswith("time.sleep(10_000)")
    assert "thread llmft-watchdog, innermost call last:" in others
    said = hanging(reports, [0, 1], lambda rank: f"rank {rank} on h{rank}")
    assert said.startswith(
        "rank 1 on h1 hangs in the forward pass of micro-batch 0 of optimizer step 4, at stand_still ("
    )
    assert re.search(r"; rank 0 on h0 waited for it; not a stage further in \d+ s \(--step-timeout\): the stacks", said)


def report(rank: int, stage: int, waiting: bool) -> dict[str, Any]:
    what = {"step": 3, "doing": "a pass", "at": "f (x.py:1)", "seconds": 60.2}
    return {"rank": rank, "stage": stage, "waiting": waiting, **what}


def test_who_hangs_is_told_from_what_the_ranks_reported() -> None:
    def said(*reports: dict[str, Any]) -> str:
        return hanging(reports, range(3), lambda rank: f"rank {rank}").partition("; not a stage further in 60 s")[0]

    assert said() == ""
    pass_3 = "in a pass of optimizer step 3, at f (x.py:1)"
    assert said(report(0, 9, True), report(1, 8, True), report(2, 8, False)) == (
        f"rank 2 hangs {pass_3}; rank 0, rank 1 waited for it"
    )
    assert said(report(0, 8, False), report(1, 8, False)) == f"rank 0 hangs {pass_3}, rank 1 hangs {pass_3}"
    assert said(report(0, 8, True), report(2, 8, True)) == (
        "rank 1 did not even report: the process or its machine stands still; waiting: "
        f"rank 0 is {pass_3}, rank 2 is {pass_3}"
    )
    assert said(report(0, 8, True), report(1, 8, True), report(2, 8, True)).startswith(
        "all wait for each other: the network between them may be broken; waiting: rank 0 is in a pass"
    )


def test_a_rank_that_saves_is_given_time_until_all_have_met_again() -> None:
    watchdog = Watchdog(60, 0, Recorder())
    assert watchdog.limit == 60
    watchdog.saving(3, "a checkpoint")
    watchdog.at(4, "the forward pass of micro-batch 0")
    assert watchdog.limit == PATIENCE_SECONDS
    watchdog.met()
    assert watchdog.limit == 60


GETS_ON = """
import time
from llmft_core.train.watchdog import Watchdog
with Watchdog(5, 0, None) as dog:
    for _ in range(30):
        dog.at(1, "a pass")
        time.sleep(0.2)
print("still there")
"""


def test_one_that_gets_on_is_left_alone() -> None:
    """In a process of its own, which the watchdog would end; it has nobody to tell, so a word of it is an error."""
    done = subprocess.run([sys.executable, "-c", GETS_ON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("still there\n", "")


HOLDS_THE_LOCK = """
import re, sys
from llmft_core.train import watchdog
watchdog.REPORTING_SECONDS = 0.5
with watchdog.Watchdog(1, 0, None) as dog:
    dog.at(1, "a pass")
    re.match("(a|a)+$", "a" * 40 + "b")
"""


def test_one_that_holds_pythons_lock_is_ended_too() -> None:
    done = subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Timeout (0:00:02" in done.stderr
    assert "line 7 in <module>" in done.stderr


STANDS_STILL = """
import time
from llmft_core.train import loop

passes, real = iter(range(1000)), loop.micro_batch_loss

def slow(*args):
    if next(passes) == 5:
        time.sleep(10_000)
    return real(*args)

loop.micro_batch_loss = slow
"""


def test_a_run_without_a_cluster_ends_itself(tmp_path: Path) -> None:
    flags = ["--workers", "0", "--dataset.rows", "16", "--dataset.test-rows", "8", "--global-batch", "2"]
    flags += ["--micro-batch", "2", "--name", "x", "--step-timeout", "5"]
    done = altered_llmft(STANDS_STILL, "run", *flags, folder=tmp_path)
    assert done.code == 1, done.err
    (error,) = [line for line in done.errors if line.startswith("llmft: error")]
    assert error.startswith(
        "llmft: error: rank 0 hangs in the forward pass of micro-batch 0 of optimizer step 6, at slow ("
    )
    assert error.endswith("give --step-timeout more; no checkpoint was complete yet")
    stack = tmp_path / "llmft-runs" / "runs" / "x" / "aside" / "step_00006_hung_rank_00000.txt"
    assert "time.sleep(10_000)" in stack.read_text()
    assert str(stack) in done.out
