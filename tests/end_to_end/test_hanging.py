"""A worker that stands still on Ray: it is found, named, and the run goes on from its state with new workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
from command import llmft_path

RUN = ["--workers", "2", "--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "8", "--epochs", "6"]
RUN += ["--strategy", "zero-2", "--state.every-steps", "8", "--max-failures", "1", "--step-timeout", "20"]


def test_a_worker_that_stands_still_is_named_and_replaced(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [llmft_path(), "run", *RUN, "--name", "still"],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ,
        )
    try:
        deadline = time.monotonic() + 300
        while "state_00000 complete" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        stopped = next(one for one in family if "RayTrainWorker" in " ".join(one.cmdline()))
        stopped.send_signal(signal.SIGSTOP)
        assert process.wait(400) == 0, log.read_text()
        assert not stopped.is_running()
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                one.kill()
            process.wait()
    text = log.read_text()
    assert re.search(
        r"warning: rank \d on \S+ did not even report: the process or its machine stands still; waiting: rank \d on "
        r"\S+ is in .* of optimizer step \d+, at \S+ \(.*\); not a stage further in \d+ s .*; `llmft resume \S+still` "
        r"goes on from state_00000",
        text,
    ), text
    assert len(re.findall(r"go on after optimizer step \d+: ", text)) == 1
    (stack,) = (tmp_path / "llmft-runs" / "runs" / "still" / "aside").glob("step_*_hung_rank_0000?.txt")
    assert "the thread that trains" in stack.read_text()
