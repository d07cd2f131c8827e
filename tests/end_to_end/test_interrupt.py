"""Ctrl-C while Ray starts, and a dead worker: the program ends with the promised code, and nothing stays behind."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Running, command_of, orphans_adopted

RUN = ["--workers", "2", "--epochs", "1000", "--dataset.rows", "32", "--dataset.test-rows", "8"]
RUN += ["--global-batch", "16", "--checkpoint.every-epochs", "0", "--name", "x"]


@pytest.fixture(scope="module", autouse=True)
def _orphans_adopted() -> Iterator[None]:
    with orphans_adopted():
        yield


@pytest.fixture
def running(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """`llmft run` on a Ray of its own, long enough to be disturbed. Its parameter: flags in place of those of `RUN`."""
    with Running(tmp_path, "run", *RUN, *getattr(request, "param", [])) as started:
        yield started


def test_ctrl_c_while_ray_starts_leaves_no_process(running: Running, tmp_path: Path) -> None:
    """A Ray whose start-up is broken off would leave agents behind, or take the interpreter down."""
    deadline = time.monotonic() + 60
    while not any("gcs_server" in command_of(process) for process in running.look().values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 130, running.text
    assert "llmft: interrupted" in running.text
    assert not (tmp_path / "llmft-runs" / "runs" / "x").exists()


@pytest.mark.parametrize("running", [["--dataset.rows", "200000"]], indirect=True)
def test_sigterm_while_the_data_is_prepared_leaves_no_process(running: Running, tmp_path: Path) -> None:
    """Ray runs by then, and has a handler of its own for this signal. The preparation of so many rows takes seconds:
    it is not over before the signal is there."""
    running.wait_for("preparing dataset")
    assert any("raylet" in command_of(process) for process in running.look().values())
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 143, running.text
    assert "llmft: interrupted: stopped by SIGTERM" in running.text
    assert not (tmp_path / "llmft-runs" / "runs" / "x").exists()


def test_a_killed_worker_fails_the_run_in_one_line(running: Running) -> None:
    running.wait_for("step 1/")
    workers = running.workers()
    assert len(workers) == 2
    workers[0].kill()
    assert running.end() == 1, running.text
    text = running.text
    (line,) = [line for line in text.splitlines() if line.startswith("llmft: error: ")]
    assert re.fullmatch(r"llmft: error: rank [01] on \S+: the process was killed .*dmesg.*no checkpoint .*", line)
    assert "raylet" not in text
    assert "Traceback" not in text
