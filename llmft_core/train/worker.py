"""One rank, from plan to last checkpoint. It knows neither Ray nor how it was started, only its process group."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from llmft_core.catalog import Catalog
from llmft_core.checkpoint.background import BackgroundPublisher
from llmft_core.checkpoint.export import export
from llmft_core.checkpoint.retention import Published, expendable, remove
from llmft_core.checkpoint.staging import Staging
from llmft_core.data.prepare import PreparedData
from llmft_core.errors import LlmftError
from llmft_core.extensions import Engine, Method, Strategy
from llmft_core.loading import load_plugins
from llmft_core.storage.places import Place, Places
from llmft_core.train.job import Job, Reporter
from llmft_core.train.loop import summary_of, train
from llmft_core.train.model import build_model
from llmft_core.train.optimizer import optimizer_maker
from llmft_core.weights.cache import cache_folder


def train_rank(job: Job, rank: int, reporter: Reporter) -> None:
    """Train this rank's part. The default process group exists and has the placement's world size.

    Raises LlmftError for whatever a user can act on.
    """
    world_size = dist.get_world_size()
    if (world_size, dist.get_rank()) != (job.placement.world_size, rank):
        raise LlmftError(f"process group has {world_size} ranks, the plan {job.placement.world_size}")
    plan = job.plan
    catalog = Catalog(load_plugins(plan.disable_plugin))
    strategy: Strategy = catalog.create("strategy", plan.strategy or {})
    method: Method = catalog.create("method", plan.method)
    data = PreparedData.open(job.data)
    engine = strategy.engine(job.placement, rank)
    try:
        if job.placement.device == "cuda":
            check_gpus(job)

        def tell(kind: str, text: str) -> None:
            if rank == 0:
                reporter.send({"kind": kind, "text": text})

        tell("phase", "loading the model")
        model = method.apply(build_model(job, engine, partial(tell, "warning")))
        engine.prepare(model, optimizer_maker(plan, job.placement.device))
        run = Places(catalog, plan.storage, plan.backends).runs() / plan.name
        with Saver(job, engine, rank, reporter, run) as saver:
            train(job, engine, data, rank, reporter, saver.save)
    except torch.OutOfMemoryError as error:
        raise LlmftError(
            f"out of GPU memory on {socket.gethostname()} ({str(error).splitlines()[0]}): lower --micro-batch "
            f"(now {job.placement.micro_batch}) or --context-length ({plan.context_length}), add "
            "--gradient-checkpointing, or spread the model with --strategy zero-3 over more --workers"
        ) from error
    finally:
        engine.finish()


def check_gpus(job: Job) -> None:
    """Every rank has a GPU of its own, with the arithmetic that the plan wants. Raises LlmftError. Collective."""
    mine = (socket.gethostname(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    taken: list[tuple[str, str]] = [("", "")] * job.placement.world_size
    dist.all_gather_object(taken, mine)
    if taken.count(mine) > 1:
        ranks = [rank for rank, gpu in enumerate(taken) if gpu == mine]
        raise LlmftError(f"ranks {ranks} share one GPU of {mine[0]}: check CUDA_VISIBLE_DEVICES, or lower --workers")
    if job.placement.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise LlmftError(f"the {name} of {mine[0]} has no bf16: use --precision fp16 or fp32")


class Saver:
    """Numbers the checkpoints of a run; exports them with all ranks, publishes and removes them beside training."""

    def __init__(self, job: Job, engine: Engine, rank: int, reporter: Reporter, run: Place) -> None:
        self.job, self.engine, self.rank, self.reporter, self.run = job, engine, rank, reporter, run
        self.count = 0
        self.published: list[Published] = []
        self.publisher = BackgroundPublisher(self._announce)

    def save(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Export `checkpoint_NNNNN` and hand it to the publisher. Collective."""
        started = time.perf_counter()
        job, name = self.job, f"checkpoint_{self.count:05d}"
        self.count += 1
        staging: Staging | None = None
        if self.rank == 0:
            self.publisher.wait()  # before the export, so that the disk never holds more than one
            staging = Staging.open(cache_folder(), job.plan.name, name)
        folder = staging.folder if staging is not None else None
        try:
            exported = export(self.engine, job.plan, job.model, job.tokenizer, job.stop_ids, folder)
        except BaseException:
            if staging is not None:
                staging.discard()
            raise
        if staging is not None and exported is not None:
            folder = staging.settle()
            numbers = summary_of(metrics)
            facts = {"step": step, "epoch": epoch, "metrics": numbers, "provenance": dict(job.provenance)}
            self.publisher.submit(folder, self.run / name, exported, facts)
            self.reporter.send({"kind": "stall", "seconds": time.perf_counter() - started})

    def _announce(self, place: Place, size: int, seconds: float, facts: Mapping[str, Any]) -> None:
        numbers = {"step": facts["step"], "metrics": facts["metrics"], "seconds": seconds, "bytes": size}
        self.reporter.send({"kind": "checkpoint", "name": place.name, "uri": place.uri, **numbers})
        self.published.append(Published(place, facts["metrics"]))
        for one in expendable(self.published, self.job.plan.checkpoint):
            remove(one.place)
            self.published.remove(one)
            self.reporter.send({"kind": "removed", "name": one.place.name})

    def __enter__(self) -> Saver:
        self.publisher.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.publisher.__exit__(*error)
