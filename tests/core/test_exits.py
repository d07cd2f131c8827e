"""How the processes of a training end: with the exit code that they should, and without a thread that could abort them
while Python is taken down (`llmft_core.train.process_group` says how)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from command import llmft
from exiting import aborted, make_job, run_ranks

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
    [({"name": "ddp"}, "nan", 1), ({"name": "zero-2"}, "done", 0), *CASES[::2]],
    ids=["ddp-error", "zero-2", "zero-3", "zero-3-error"],
)
def test_no_thread_of_a_process_group_is_left(strategy: dict[str, Any], end: str, code: int, tmp_path: Path) -> None:
    check(tmp_path, strategy, end, code, times=1)


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
