"""Ctrl-C and a dead worker: the program ends with the promised code, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from command import llmft_path

ENDS_WITHIN = 90  # seconds


class Running:
    """`llmft run` on a Ray of its own, long enough to be disturbed."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        flags = ["--workers", "2", "--epochs", "1000", "--dataset.rows", "32", "--dataset.test-rows", "8"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [llmft_path(), "run", *flags, "--global-batch", "16", "--checkpoint.every-epochs", "0", "--name", "x"],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ,
            )

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 240
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    started = Running(tmp_path)
    yield started
    if started.process.poll() is None:
        for process in [*started.family(), psutil.Process(started.process.pid)]:
            process.kill()
        started.process.wait()


def test_ctrl_c_while_ray_starts_leaves_no_process(running: Running, tmp_path: Path) -> None:
    """A Ray whose start-up is broken off would leave agents behind, or take the interpreter down."""
    running.wait_for("starting workers")
    deadline = time.monotonic() + 60
    while not any("gcs_server" in " ".join(process.cmdline()) for process in running.family()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    session = psutil.Process(running.process.pid)
    running.process.send_signal(signal.SIGINT)
    family = {process.pid: process for process in running.family()}
    while running.process.poll() is None:
        assert time.monotonic() < deadline + ENDS_WITHIN, running.log.read_text()
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends while it is looked at
            family |= {process.pid: process for process in session.children(recursive=True)}
        time.sleep(0.1)
    assert running.process.returncode == 130, running.log.read_text()
    _, alive = psutil.wait_procs(list(family.values()), timeout=20)
    assert not alive, [process.cmdline() for process in alive]
    assert "llmft: interrupted" in running.log.read_text()
    assert not (tmp_path / "llmft-runs" / "runs" / "x").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_process_and_says_so(sent: int, running: Running, tmp_path: Path) -> None:
    running.wait_for("step 1/")
    family = running.family()
    assert any("ray" in " ".join(process.cmdline()) for process in family)
    running.process.send_signal(sent)
    assert running.process.wait(ENDS_WITHIN) == 130, running.log.read_text()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [process.cmdline() for process in alive]
    text = running.log.read_text()
    assert "llmft: interrupted: stopped by the user: no checkpoint was complete yet" in text
    assert "Traceback" not in text
    assert "SIGTERM received" not in text, "Ray's own handler is replaced"
    assert not list((tmp_path / "llmft-runs").rglob(".is_checkpoint"))


def test_a_killed_worker_fails_the_run_in_one_line(running: Running) -> None:
    running.wait_for("step 1/")
    workers = [process for process in running.family() if "RayTrainWorker" in " ".join(process.cmdline())]
    assert len(workers) == 2
    family = running.family()
    workers[0].kill()
    assert running.process.wait(ENDS_WITHIN) == 1, running.log.read_text()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [process.cmdline() for process in alive]
    text = running.log.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("llmft: error: ")]
    assert re.fullmatch(r"llmft: error: rank [01] on \S+: the process was killed .*dmesg.*no checkpoint .*", line)
    assert "raylet" not in text
    assert "Traceback" not in text
