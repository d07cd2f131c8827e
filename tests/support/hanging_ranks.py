"""Ranks that hang; here, because a spawned process has to import it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guarding import VOCABULARY, job_of
from ranks import forks, free_port, inherit, set_layout
from tables import InMemory, random_table

WORLD_SIZE = 2
PASSES = 6  # forward passes of a rank before it hangs: in step 4, of two micro-batches each


class FileReporter:
    """Events of a rank that ends without a word."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def send(self, event: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")


def hang(case: dict[str, Any], folder: Path, seconds: float) -> tuple[list[int | None], list[dict[str, Any]]]:
    """Two ranks of which rank 1 hangs in a forward pass; exit codes, and what the watchdogs reported."""
    port, environment = free_port(), dict(os.environ)
    processes = [
        forks().Process(target=hanging_rank, args=(rank, port, case, folder, seconds, environment))
        for rank in range(WORLD_SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    events = [
        json.loads(line) for rank in range(WORLD_SIZE) for line in (folder / f"events-{rank}").read_text().splitlines()
    ]
    return codes, [event for event in events if event["kind"] == "hung"]


def hanging_rank(
    rank: int, port: int, case: dict[str, Any], folder: Path, seconds: float, environment: Mapping[str, str]
) -> None:
    inherit(environment)
    set_layout(rank, WORLD_SIZE, port)
    import torch
    import torch.distributed as dist

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.train.loop import train
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker
    from llmft_core.train.watchdog import Watchdog

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    job = job_of(case)
    engine = Catalog(load_plugins()).create("strategy", job.plan.strategy).engine(job.placement, rank)
    engine.prepare(build_model(job, engine), optimizer_maker(job.plan))
    passes = iter(range(1000))

    def stand_still(*_: Any) -> None:
        # Without gradients it is a probe before training.
        if torch.is_grad_enabled() and next(passes) == PASSES and rank == 1:
            time.sleep(10_000)

    engine.bare_model.model.layers[1].register_forward_hook(stand_still)
    data = InMemory(random_table(16, VOCABULARY, 20))
    reporter = FileReporter(folder / f"events-{rank}")
    with Watchdog(seconds, rank, reporter) as watchdog:
        train(job, engine, data, rank, reporter, lambda *_: None, watchdog=watchdog)  # type: ignore[arg-type]
