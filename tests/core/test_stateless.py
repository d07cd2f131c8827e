"""A strategy of which no state can be taken: a run that is asked to stop ends after its step, and says so."""

from __future__ import annotations

import json
from pathlib import Path

from command import altered_llmft

STOPS = """
import os, signal
from llmft_core.train import loop
from llmft_plugins.strategies.ddp import Ddp, DdpEngine

def unreadable(self):
    raise RuntimeError("its moments are elsewhere")

Ddp.state_problem, DdpEngine.fragments = lambda self: "its moments are elsewhere", unreadable
passes, real = iter(range(1000)), loop.micro_batch_loss

def stopping(*args):
    if next(passes) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)

loop.micro_batch_loss = stopping
"""


def test_a_run_without_states_ends_after_its_step(tmp_path: Path) -> None:
    flags = ["--workers", "0", "--dataset.rows", "16", "--dataset.test-rows", "8", "--global-batch", "2"]
    flags += ["--micro-batch", "2", "--name", "x", "--state.every-minutes", "0"]
    done = altered_llmft(STOPS, "run", *flags, folder=tmp_path)
    said = done.out + done.err
    assert done.code == 143, said
    assert "SIGTERM: ending after this step, without a state to go on from (its moments are elsewhere); send" in said
    assert "llmft: interrupted: stopped by SIGTERM after optimizer step 3 of " in said
    assert "no checkpoint was complete yet" in said
    assert "Traceback" not in said
    run = tmp_path / "llmft-runs" / "runs" / "x"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert list(run.glob("state_*")) == []
