"""One rank, from plan to last checkpoint. It knows neither Ray nor how it was started, only its process group."""

from __future__ import annotations

import socket
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from llmft_core.catalog import Catalog
from llmft_core.checkpoint.adapter import start_of
from llmft_core.checkpoint.leftovers import next_numbers, sweep
from llmft_core.checkpoint.stored_state import forget, newest_state, open_state, restore
from llmft_core.data.prepare import PreparedData
from llmft_core.errors import LlmftError
from llmft_core.extensions import Engine, Method, Strategy
from llmft_core.loading import load_plugins
from llmft_core.storage.places import Place, Places
from llmft_core.train.aside import put_aside
from llmft_core.train.compiled import compile_blocks, compiler_errors
from llmft_core.train.deterministic import deterministic_kernels
from llmft_core.train.gpu_memory import applies_to, measured, out_of_memory
from llmft_core.train.job import Job, Reporter, Resume
from llmft_core.train.loop import AskedToStop, train
from llmft_core.train.method import applied, setting_of
from llmft_core.train.model import build_model
from llmft_core.train.optimizer import optimizer_maker
from llmft_core.train.saver import Saver
from llmft_core.train.state_saver import StateSaver
from llmft_core.train.watchdog import Watchdog
from llmft_core.weights.cache import cache_folder


def train_rank(
    job: Job,
    rank: int,
    reporter: Reporter,
    asked_to_stop: AskedToStop = lambda: False,
    *,
    again: bool = False,
) -> None:
    """Train this rank's part, to the end or until rank 0 is asked to stop; returns when all that was begun is complete
    in storage. The default process group exists and has the placement's world size. `again`: the launcher has started
    the ranks again.

    Raises LlmftError for whatever a user can act on.
    """
    world_size = dist.get_world_size()
    if (world_size, dist.get_rank()) != (job.placement.world_size, rank):
        raise LlmftError(f"process group has {world_size} ranks, the plan {job.placement.world_size}")
    plan = job.plan
    catalog = Catalog(load_plugins(plan.disable_plugin))
    places = Places(catalog, plan.storage, plan.backends)
    run = places.runs() / plan.name
    job = as_it_stands(job, run, rank, reporter, again=again)
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
        setting = setting_of(plan, job.placement, job.special_ids, catalog)
        loading = {} if setting.partitioned else method.loading(setting)
        model = applied(method, build_model(job, engine, partial(tell, "warning"), loading), setting, engine)
        adapter = method.adapter(model, setting)
        if plan.compile:
            compile_blocks(model, plan)
        engine.prepare(model, optimizer_maker(plan))
        start = start_of(engine, adapter) if adapter is not None else None
        if job.resume is not None and job.resume.state:
            tell("phase", f"restoring the state of step {job.resume.step}")
            restore_state(places.place(job.resume.state), engine)
        with (
            compiler_errors(plan.compile),
            deterministic_kernels(plan.deterministic),
            Saver(job, engine, rank, reporter, run, start) as saver,
            StateSaver(job, engine, rank, saver, run, saver.background) as states,
            Watchdog(plan.step_timeout, rank, reporter) as watchdog,
        ):
            train(
                job,
                engine,
                data,
                rank,
                saver,
                saver.save,
                states if not strategy.state_problem() else None,
                put_aside(run, partial(tell, "warning")),
                watchdog,
                asked_to_stop,
            )
    except torch.OutOfMemoryError as error:
        said = str(error).splitlines()[0]
        applies = partial(applies_to, catalog, job.special_ids)
        host, memory = socket.gethostname(), measured(engine)
        raise LlmftError(out_of_memory(plan, job.placement, memory, applies, host, said)) from error
    finally:
        engine.finish()


def as_it_stands(job: Job, run: Place, rank: int, reporter: Reporter, *, again: bool) -> Job:
    """The job, or where it goes on after the launcher has started the ranks again: from the newest state that was
    written since the launch, or as the launch began. Rank 0's `again` counts. Collective."""
    answer: list[Resume | None] = [None]
    if rank == 0 and again:
        began = job.resume or Resume("", 0, 0, 0)
        numbers = next_numbers(run)
        sweep(run)  # of the ranks that are gone
        place = newest_state(run, began.next_state)
        onward = began
        if place is not None:
            progress = open_state(place).progress
            onward = replace(began, state=place.uri, step=progress.step, guards=progress.guards)
        answer = [replace(onward, next_state=numbers["state"], next_checkpoint=numbers["checkpoint"])]
        reporter.send({"kind": "restarted", "step": onward.step})
    dist.broadcast_object_list(answer, src=0)
    return job if answer[0] is None else replace(job, resume=answer[0])


def restore_state(place: Place, engine: Engine) -> None:
    """This rank's part of a state, in storage until now. Collective."""
    state = open_state(place)
    restore(state, engine, cache_folder())
    dist.barrier()  # all ranks of this node have read its copies
    forget(state, cache_folder())


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
