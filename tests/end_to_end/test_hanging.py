"""A worker that stands still on Ray: it is found, named, and the run goes on from its state with new workers."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from hold import Hold
from running import Running

RUN = ["--workers", "2", "--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "8", "--epochs", "2"]
RUN += ["--strategy", "zero-2", "--state.every-steps", "8", "--max-failures", "1", "--step-timeout", "20"]


@pytest.mark.timeout(1500)
def test_a_worker_that_stands_still_is_named_and_replaced(tmp_path: Path) -> None:
    hold = Hold(tmp_path, in_pass=10)  # a pass a step: after the only state, which is published meanwhile
    command = ["run", *RUN, *hold.flags, "--name", "still"]
    with Running(tmp_path, *command, environment=hold.environment) as running:
        hold.wait(running)
        running.wait_for("state_00000 complete")
        stopped = running.workers()[0]
        stopped.send_signal(signal.SIGSTOP)
        hold.release()
        assert running.end() == 0, running.text
    text = running.text
    assert re.search(
        r"warning: rank \d on \S+ did not even report: the process or its machine stands still; waiting: rank \d on "
        r"\S+ is in .* of optimizer step \d+, at \S+ \(.*\); not a stage further in \d+ s .*; `llmft resume \S+still` "
        r"goes on from state_00000",
        text,
    ), text
    assert len(re.findall(r"go on after optimizer step \d+: ", text)) == 1
    (stack,) = (tmp_path / "llmft-runs" / "runs" / "still" / "aside").glob("step_*_hung_rank_0000?.txt")
    assert "the thread that trains" in stack.read_text()
