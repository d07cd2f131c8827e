"""How the processes of a training end: with the exit code that they should, and without a thread that could abort them
while Python is taken down (`llmft_core.train.process_group` says how)."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import llmft
from exiting import aborted, make_job, run_ranks
from ranks import free_port

OFFLOADED = {"name": "zero-3", "offload": "all"}
CASES = [
    ({"name": "zero-3"}, "done", 0),
    (OFFLOADED, "done", 0),
    ({"name": "zero-3"}, "nan", 1),
    ({"name": "zero-3"}, "stopped", 143),
]
NAMES = ["zero-3", "offloaded", "error", "signal"]
OF_GROUPS = ("gloo", "tcpstore")
"""In the names of the threads of process groups and their stores."""

LATE = """
import atexit, sys, time
atexit.register(sum, range(4 * 10**8))  # seconds with Python's lock held, and then Python is taken down
import torch
import torch.distributed as dist
rank, port, end = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
import torch.distributed.nn.functional  # keeps the group as a default
from llmft_core.train.process_group import end_process_groups

class Slow:
    def __del__(self):
        time.sleep(1)  # without the lock, which gloo's thread waits for

slow = Slow()
dist.barrier()
if rank == 1:
    atexit.unregister(sum)
    time.sleep(2)
dist.all_reduce(torch.ones(3), async_op=True)
end_process_groups() if end == "ours" else dist.destroy_process_group()
"""
"""Two ranks, of which rank 0 is about to exit when its last collective is done."""


def check(folder: Path, strategy: dict[str, Any], end: str, code: int, times: int) -> None:
    """Run the ranks of a training `times` times, each time in fresh processes, and look how all of them end."""
    make_job(folder, strategy, end)
    for number in range(times):
        shutil.rmtree(folder / "runs", ignore_errors=True)
        for rank, ended in enumerate(run_ranks(folder)):
            where = f"rank {rank} of run {number}"
            assert ended.code == code, f"{where}: exit code {ended.code}\n{ended.error}"
            assert not aborted(ended.error), ended.error
            left = [name for name in ended.threads if any(part in name for part in OF_GROUPS)]
            assert ended.threads, f"{where} said nothing of its threads"
            assert not left, f"{where}: threads {left} outlive their process groups"


@pytest.mark.parametrize(
    ("strategy", "end", "code"),
    [
        ({"name": "ddp"}, "nan", 1),
        CASES[0],
        pytest.param({"name": "zero-2"}, "done", 0, marks=pytest.mark.slow),
        pytest.param(*CASES[2], marks=pytest.mark.slow),
    ],
    ids=["ddp-error", "zero-3", "zero-2", "zero-3-error"],
)
def test_no_thread_of_a_process_group_is_left(strategy: dict[str, Any], end: str, code: int, tmp_path: Path) -> None:
    check(tmp_path, strategy, end, code, times=1)


def late(end: str) -> list[tuple[int, str]]:
    """Exit code and standard error of each rank."""
    command = [sys.executable, "-W", "ignore", "-c", LATE]
    port = str(free_port())
    ranks = [subprocess.Popen([*command, rank, port, end], stderr=subprocess.PIPE, text=True) for rank in "01"]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


def test_a_collective_that_ends_late_aborts_nothing() -> None:
    """That this comes to an abort without our way of ending is shown by the next test, where the machine is quick."""
    for code, error in late("ours"):
        assert code == 0, error
        assert not aborted(error)


@pytest.mark.slow
def test_pytorchs_own_way_does_abort() -> None:
    """Where it no longer does, `end_process_groups` may go. It needs seconds in which both ranks are not held up."""
    ends = [rank for _ in range(5) for rank in late("torch's")]
    assert any(code == -signal.SIGABRT and aborted(error) for code, error in ends), ends


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("strategy", "end", "code"), CASES, ids=NAMES)
def test_of_twenty_runs_none_aborts(strategy: dict[str, Any], end: str, code: int, tmp_path: Path) -> None:
    check(tmp_path, strategy, end, code, times=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("workers", "times"), [("0", 20), ("2", 5)])
def test_no_command_aborts(workers: str, times: int, tmp_path: Path) -> None:
    """The same with the driver's part, in this process and under Ray."""
    flags = ["--strategy", "zero-3", "--dataset.rows", "24", "--dataset.test-rows", "4", "--global-batch", "4"]
    for number in range(times):
        answer = llmft("run", *flags, "--max-steps", "2", "--workers", workers, "--name", f"r{number}", folder=tmp_path)
        assert answer.code == 0, answer.err
        assert not aborted(answer.err + answer.out)
