"""What a rank's training reads back from its device and asks of the other ranks; here, because a spawned process has to
import it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tables import InMemory, random_table
from training import VOCABULARY, Recorder

from llmft_core.plan import RunPlan
from llmft_core.train.job import Job
from llmft_core.values import Placement

STEPS = 3
READS = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",  # item(), float(), bool(), `if tensor`
        "nonzero",  # and an index by a mask, which is made of it
        "masked_select",
        "equal",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "repeat_interleave",
    )
)
"""Operators whose answer, or the size of it, the host waits for where the tensor is on a GPU."""
COLLECTIVE = "c10d::"
"""How the operators of process groups begin, also of those that are called from C++."""


class Watched(NamedTuple):
    """One training of STEPS optimizer steps."""

    strategy: str
    base: str
    world_size: int
    accumulation: int
    precision: str = "fp32"
    packed: bool = False
    disturbed: str = ""
    """What each micro-batch does besides: `forward` and `backward` read a number back in that pass, `collective` sums
    one over the ranks."""


def operators(rank: int, cases: list[Watched]) -> list[dict[str, int]]:
    """For each case, how often `llmft_core.train.loop.train` calls the operators of READS and the collectives.

    PyTorch's profiler sees every operator, those that C++ calls in a backward pass or in DDP's reducer too.
    """
    from torch.profiler import ProfilerActivity, profile

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.train.loop import train
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    catalog, answers = Catalog(load_plugins()), []
    for case in cases:
        job = job_of(case)
        data = InMemory(random_table(8 * STEPS * job.placement.global_batch, VOCABULARY, 20))  # enough when packed
        engine = catalog.create("strategy", job.plan.strategy).engine(job.placement, rank)
        engine.prepare(build_model(job, engine), optimizer_maker(job.plan))
        disturb(engine, case.disturbed)
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            train(job, engine, data, rank, Recorder(), lambda *_: None)  # type: ignore[arg-type]
        engine.finish()
        called = Counter(event.name for event in watched.events())
        assert called["aten::embedding"] >= STEPS * case.accumulation, "the profiler does not see the forward passes"
        assert called["aten::embedding_dense_backward"] >= STEPS * case.accumulation, "nor the backward passes"
        answers.append({name: n for name, n in called.items() if name in READS or name.startswith(COLLECTIVE)})
    return answers


def job_of(case: Watched) -> Job:
    """Steps in one epoch, of one row a micro-batch."""
    batch = case.world_size * case.accumulation
    settings = {
        "strategy": case.strategy,
        "precision": case.precision,
        "global-batch": batch,
        "context-length": 40,
        "lr": 1e-2,
    }
    packing = {"packing": "best-fit" if case.packed else "none"}
    plan = RunPlan.from_json({**settings, "data": packing, "state": {"every-minutes": 0}})
    placement = Placement(case.world_size, "cpu", case.precision, 1, case.accumulation, plan.max_grad_norm)  # type: ignore[arg-type]
    return Job(plan, placement, STEPS, (STEPS,), VOCABULARY, 0, (), {}, Path(case.base), Path(), Path())


def disturb(engine: Any, how: str) -> None:
    """From now on every forward pass of training does more."""
    import torch
    import torch.distributed as dist

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():  # a probe before training
            return
        hidden = output.last_hidden_state
        if how == "forward":
            hidden.detach().sum().item()
        elif how == "backward":
            hidden.register_hook(lambda gradient: gradient.sum().item() and None)
        elif how == "collective":
            dist.all_reduce(hidden.detach().sum())

    if how:
        engine.bare_model.model.register_forward_hook(hook)
