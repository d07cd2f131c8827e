"""Ranks as plain programs of which it matters how they end: `python exiting.py FOLDER RANK PORT` is one of them.

The launcher's part is done here as `llmft_core.train.launch` does it for one rank, with several ranks and without Ray.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ranks import free_port, set_layout

WORLD_SIZE, TOTAL = 2, 3
STOP_AFTER = 1  # optimizer steps: the signal then comes in time for the sum of step 2, which ends the run before step 3
ENDS_WITHIN = 240  # seconds; this is a limit for a hanging rank, not a promise
ABORTED = ("terminate called", "Aborted", "Fatal Python error", "free()", "corrupted", "Segmentation", "core dumped")


@dataclass(frozen=True)
class Ended:
    """How a rank's process ended: its exit code (negative: the signal), what it said on standard error, and the names
    of its native threads when there was nothing left to do but to exit."""

    code: int
    error: str
    threads: tuple[str, ...]


def aborted(said: str) -> list[str]:
    """The lines by which a process says that it was taken down, or libraries in it."""
    return [line for line in said.splitlines() if any(word in line for word in ABORTED)]


def make_job(folder: Path, strategy: dict[str, Any], end: str) -> None:
    """Write `job.json` into an empty folder: three steps of the built-in model on the built-in data, with a state, an
    evaluation and a checkpoint. `end`: `done`, `nan` (the loss of step 2 is no number, on rank 1), or `stopped` (rank 0
    gets SIGTERM after step 1, so that step 2 is the last)."""
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.plan import RunPlan
    from llmft_core.prepare import make_ready
    from llmft_core.weights.stage import stage_model

    plan = RunPlan.from_json(
        {
            "name": "r",
            "workers": 0,
            "strategy": strategy,
            "dataset": {"name": "arithmetic", "rows": 24, "test-rows": 4},
            "storage": {"name": "local", "root": str(folder / "runs")},
            "global-batch": 2 * WORLD_SIZE,
            "micro-batch": 1,
            "max-steps": TOTAL,
            "state": {"every-steps": 1, "every-minutes": 0},
            "tracker": [],
        }
    )
    catalog = Catalog(load_plugins())
    ready = make_ready(plan, catalog, debug=True, say=lambda _: None)
    model = stage_model(ready.plan, catalog, ready.places, weights=True)
    job = replace(ready.job, model=model.path, placement=ready.job.placement.for_world_size(WORLD_SIZE, 1))
    (folder / "job.json").write_text(json.dumps({"job": job.to_json(), "end": end}))


def run_ranks(folder: Path) -> list[Ended]:
    """Start the ranks of the folder's job, which leaves nothing of an earlier run in the way; how each ended."""
    port = free_port()
    command = [sys.executable, "-X", "faulthandler", str(Path(__file__).resolve()), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD_SIZE)
    ]
    try:
        said = [process.communicate(timeout=ENDS_WITHIN) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [
        Ended(process.returncode, error, tuple(out.split("threads: ")[-1].split()))
        for process, (out, error) in zip(processes, said, strict=True)
    ]


def main(folder: Path, rank: int, port: int) -> int:
    """One rank, from the start of its process group to its exit code."""
    set_layout(rank, WORLD_SIZE, port)
    import torch
    import torch.distributed as dist

    from llmft_core.errors import LlmftError, Terminated
    from llmft_core.train import loop
    from llmft_core.train.failures import Watch
    from llmft_core.train.job import Job
    from llmft_core.train.launch import CallReporter
    from llmft_core.train.process_group import end_process_groups
    from llmft_core.train.stopping import Stop
    from llmft_core.train.worker import train_rank

    torch.set_num_threads(1)
    described = json.loads((folder / "job.json").read_text())
    job, end = Job.from_json(described["job"]), described["end"]
    if end == "nan" and rank == 1:
        real, passes = loop.micro_batch_loss, iter(range(1000))
        loop.micro_batch_loss = lambda *args: real(*args) * (float("nan") if next(passes) == 2 else 1.0)

    def on_event(event: dict[str, Any]) -> None:
        if end == "stopped" and rank == 0 and event["kind"] == "metrics" and event["step"] == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)

    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    with Stop() as stop:
        watch = Watch(on_event, job, stop)
        try:
            with stop.announced(watch.announce):
                train_rank(job, rank, CallReporter(watch), stop.asked)
        except LlmftError as error:
            print(f"llmft: error: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            end_process_groups()
    return Terminated.exit_code if end == "stopped" and watch.unfinished else 0


def native_threads() -> list[str]:
    """The names of this process's threads, without spaces; of those that C++ started too."""
    return ["".join(path.read_text().split()) for path in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print("threads:", *native_threads(), flush=True)
    sys.exit(code)
