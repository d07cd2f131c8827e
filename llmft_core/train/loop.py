"""The training loop. It knows an Engine, a table of tokens and a Reporter; neither Ray nor DeepSpeed nor plugins."""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from llmft_core.data.batches import Form, MicroBatch, rank_micro_batches, real_tokens, trained_tokens
from llmft_core.data.order import Order, mix_of
from llmft_core.extensions import Engine
from llmft_core.train.aside import PutAside
from llmft_core.train.compiled import compile_ahead, graphs, uncompiled
from llmft_core.train.evaluate import evaluate
from llmft_core.train.guards import Guards, with_its_gradient
from llmft_core.train.isolation import check_isolation
from llmft_core.train.job import Job, Reporter
from llmft_core.train.loss import Call, micro_batch_loss
from llmft_core.train.output_probe import find_output_layer
from llmft_core.train.schedule import learning_rate
from llmft_core.train.watchdog import Watchdog

if TYPE_CHECKING:
    from llmft_core.data.prepare import PreparedData

Save = Callable[[int, int, dict[str, float]], None]
"""Write a checkpoint after (optimizer steps done, epoch, metrics). Collective."""


class States(Protocol):
    """What takes a rank's states."""

    @property
    def busy(self) -> bool:
        """Whether this rank's part of one is still being written or published."""

    def save(self, step: int, guards: Mapping[str, Any], last: bool = False) -> None:
        """Take one after optimizer step number `step` (from 1), with `Guards.memory`; `last`: the run ends here. Called
        on all ranks; not collective."""


AskedToStop = Callable[[], bool]
"""Whether training is to end after the step that is being done. Rank 0's answer counts."""


def train(
    job: Job,
    engine: Engine,
    data: PreparedData,
    rank: int,
    reporter: Reporter,
    save: Save,
    states: States | None = None,
    put_aside: PutAside | None = None,
    watchdog: Watchdog | None = None,
    asked_to_stop: AskedToStop = lambda: False,
) -> None:
    """Train from the first optimizer step, or the one after the state that was restored, to the last, evaluating and
    saving where the plan says so. Where rank 0 is asked to stop, all ranks write a state after the step and return."""
    plan, placement = job.plan, job.placement
    watchdog = watchdog or Watchdog(0, rank, reporter)
    device = torch.device("cuda", torch.cuda.current_device()) if placement.device == "cuda" else torch.device("cpu")
    form = Form.of(plan, job.pad_id)
    if plan.compile:
        watchdog.compiling()
        if rank == 0:
            reporter.send({"kind": "phase", "text": "compiling the model's blocks"})
        said = compile_ahead(job, engine, device)
        if rank == 0:
            reporter.send({"kind": "phase", "text": said})
    with uncompiled(plan.compile):  # it calls the model otherwise than training does
        output, caution = find_output_layer(job, engine, device)
    call = Call.of(output, engine.bare_model)
    if rank == 0 and caution:
        reporter.send({"kind": "warning", "text": caution})
    if form.packed:
        check_isolation(job, engine, device)
    order = Order.of(data.train, plan, mix_of(data))
    guards = Guards(job, data.train, rank, reporter, put_aside)
    latest: dict[str, float] = {}
    first = job.resume.step if job.resume else 0
    state_written = time.monotonic()
    compiled = graphs() if plan.compile else 0
    for step in range(first, job.total_steps):
        started = time.perf_counter()
        epoch, step_of_epoch = job.locate(step)
        if step_of_epoch == 0 or step == first:
            in_order = order.epoch(epoch)
        rows = in_order.step(step_of_epoch, placement.global_batch)
        tokens = trained_tokens(data.train, rows)  # over all ranks and micro-batches: what the loss is a mean over
        rate = learning_rate(plan, step, job.total_steps)
        engine.set_learning_rate(rate)

        loss = torch.zeros((), dtype=torch.float32, device=device)  # this rank's share, nats per trained token
        shares: list[torch.Tensor] = []  # by micro-batch
        batches = Waited(rank_micro_batches(data.train, rows, placement, rank, form), since=started)
        watchdog.at(step + 1, "the data of micro-batch 0")
        for number, batch in enumerate(batches):
            watchdog.at(step + 1, f"the forward pass of micro-batch {number}")
            seed_dropout(plan.seed, step, batch.index)
            share = micro_batch_loss(engine.model, batch, device, call) / tokens
            watchdog.at(step + 1, f"the backward pass of micro-batch {number}")
            engine.backward(with_its_gradient(share), last=number == placement.accumulation - 1)
            shares.append(share.detach())
            loss += shares[-1]
            watchdog.at(step + 1, f"the data of micro-batch {number + 1}")
        watchdog.at(step + 1, "the application of the step")
        outcome = engine.step()
        # Rank 0's clock decides for all when a state is due, and it alone is asked to stop; a state that is due by the
        # clock waits until every rank is done with the one before. All this travels with the loss.
        minutes = (time.monotonic() - state_written) / 60
        by_time = rank == 0 and bool(plan.state.every_minutes) and minutes >= plan.state.every_minutes
        busy = states is not None and states.busy
        word = torch.tensor([by_time, busy, rank == 0 and asked_to_stop()], dtype=torch.float32, device=device)
        summed = torch.cat([loss.view(1), word])
        watchdog.at(step + 1, "the sum of the losses")
        dist.all_reduce(summed)
        total, by_time, busy, stopping = summed.tolist()
        watchdog.saving(step + 1, "the check of the step")  # it may write rows into storage
        guards.check(step, rows, total, outcome, shares)
        watchdog.met()

        seconds = time.perf_counter() - started
        latest = {
            "train/loss": total,
            "train/grad_norm": outcome.grad_norm,
            "train/learning_rate": rate,
            "train/tokens_per_second": real_tokens(data.train, rows) / seconds,
            "train/trained_tokens": float(tokens),
            "train/step_seconds": seconds,
            "train/data_seconds": batches.seconds,
            "train/peak_memory_bytes": float(peak_memory(device)),
            "train/skipped": float(not outcome.applied),
        }
        done = step + 1
        epoch_ends = step_of_epoch == job.epoch_steps[epoch] - 1
        due = is_due(job, done, epoch, epoch_ends)
        if due["evaluate"] and data.test is not None:
            latest |= evaluate(job, engine, data.test, rank, device, call, partial(watchdog.at, done))
        if rank == 0 and plan.compile and graphs() > compiled:
            compiled = graphs()
            text = f"step {done} took long: blocks were compiled again; where that goes on, leave out --compile"
            reporter.send({"kind": "warning", "text": text})
        if rank == 0:
            reporter.send({"kind": "metrics", "step": done, "epoch": epoch, "metrics": latest})
        if due["save"]:
            watchdog.saving(done, "a checkpoint")
            save(done, epoch, latest)
        if states is not None and (due["state"] or (by_time and not busy) or stopping) and done < job.total_steps:
            watchdog.saving(done, "a state")
            states.save(done, guards.memory, stopping)
            state_written = time.monotonic()
        if stopping:
            return


class Waited:
    """Micro-batches, and for how many `seconds` the loop waited for them: from `since` until it had the first one, and
    from its asking for each other one."""

    def __init__(self, batches: Iterator[MicroBatch], since: float) -> None:
        self._batches = batches
        self.seconds = time.perf_counter() - since

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            asked = time.perf_counter()
            batch = next(self._batches, None)
            self.seconds += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


def is_due(job: Job, done: int, epoch: int, epoch_ends: bool) -> dict[str, bool]:
    """What follows optimizer step number `done` (from 1)."""
    plan, last = job.plan, done == job.total_steps
    every = plan.checkpoint.every_epochs
    return {
        "evaluate": last or epoch_ends or bool(plan.eval_every_steps and done % plan.eval_every_steps == 0),
        "save": last
        or bool(every and epoch_ends and (epoch + 1) % every == 0)
        or bool(plan.checkpoint.every_steps and done % plan.checkpoint.every_steps == 0),
        "state": bool(plan.state.every_steps and done % plan.state.every_steps == 0),
    }


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Random numbers of a forward pass depend on its place in the global batch, not on the rank that computes it."""
    digest = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def peak_memory(device: torch.device) -> int:
    """Largest memory of this rank so far, in bytes: of the GPU's allocator, or resident on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def summary_of(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that a checkpoint carries; the loss of a step that was skipped is no number, and none of them."""
    wanted = ("train/loss", "train/learning_rate", "eval/loss", "eval/perplexity")
    return {name: float(metrics[name]) for name in wanted if math.isfinite(metrics.get(name, math.nan))}
