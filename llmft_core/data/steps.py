"""How many optimizer steps a run has, and what its first epoch looks like: known before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmft_core.data.batches import Form, padding_waste, steps_of
from llmft_core.data.order import Order, packed_rows
from llmft_core.errors import InputError
from llmft_core.plan import RunPlan
from llmft_core.values import Placement


@dataclass(frozen=True)
class FirstEpoch:
    """The first epoch of a run. The others differ in their order, and where a mix has fractions of a source also in
    their samples."""

    samples: int
    tokens: int
    rows: int  # of the batches: samples, or packed ones
    left_out: int  # rows, by --data.drop-last
    padding: float  # share of the positions computed
    packed_rows: int  # into which best-fit packing brings the samples, whether it is wanted or not
    packed_padding: float  # share of the packed rows' positions


def first_epoch(order: Order, plan: RunPlan, placement: Placement) -> FirstEpoch:
    """What the first epoch of the training rows looks like."""
    epoch = order.epoch(0)
    lengths = epoch.lengths(order.lengths)
    kept = len(lengths)
    if plan.data.drop_last:
        kept -= kept % placement.global_batch
    tokens = int(lengths.sum())
    packed = len(epoch)
    if not order.capacity:
        packed = packed_rows(order.lengths[epoch.samples], plan.context_length)
    return FirstEpoch(
        samples=len(epoch.samples),
        tokens=tokens,
        rows=len(epoch),
        left_out=len(lengths) - kept,
        padding=padding_waste(
            lengths[:kept], placement.global_batch, placement.micro_batch, Form.of(plan, pad_id=0).width
        ),
        packed_rows=packed,
        packed_padding=1 - tokens / (packed * plan.context_length),
    )


def epoch_steps(order: Order, plan: RunPlan, placement: Placement, micro_batch: int | None) -> tuple[int, ...]:
    """Optimizer steps of each epoch that the run begins; the run may end within the last one. `micro_batch` is what
    the user asked for, if anything.

    Raises InputError where an epoch has fewer rows than one step takes.
    """
    found: list[int] = []
    steps, limit = 0, 1 if plan.smoke_test else plan.max_steps or math.inf
    while len(found) < (plan.epochs or math.inf) and steps < limit:
        if not found or not order.always_alike:
            rows = order.rows(len(found))
            if rows < placement.global_batch:
                raise InputError(too_few_rows(order, len(found), rows, placement, micro_batch))
            in_epoch = steps_of(rows, placement.global_batch, drop_last=plan.data.drop_last)
        found.append(in_epoch)
        steps += in_epoch
    return tuple(found)


def total_steps(plan: RunPlan, epochs: tuple[int, ...]) -> int:
    """Optimizer steps of the run: what --epochs or --max-steps allows, whichever ends first."""
    return 1 if plan.smoke_test else min(sum(epochs), plan.max_steps or sum(epochs))


def too_few_rows(order: Order, epoch: int, rows: int, placement: Placement, micro_batch: int | None) -> str:
    """What is said where an epoch has fewer rows than one optimizer step takes."""
    wanted = placement.global_batch
    if order.capacity:
        samples = len(order.epoch(epoch).samples)
        takes, there = f"{wanted} packed rows", f"the {rows} of {order.capacity} tokens that {samples} make"
        more = f"give about {math.ceil(wanted * samples / max(1, rows))} rows or more"
    else:
        takes, there, more = f"{wanted} rows", f"the {rows} there are", f"give at least {wanted}"
    if order.mix is not None:
        there += f" in epoch {epoch + 1} of the mix"
        more = "raise the weights of --data.mix"
    text = f"one optimizer step takes {takes}, more than {there}: {more}"
    if not rows:
        return text
    workers = min(placement.world_size, rows)
    together = workers * (micro_batch or 1)
    largest = rows // together * together or rows // workers * workers
    text += f", or use --global-batch {largest}"
    text += f" --workers {workers}" if workers < placement.world_size else ""
    return text + (" --micro-batch 1" if largest % together else "")
