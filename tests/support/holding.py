"""What a rank does in tests of what engines hold; here, because a spawned process has to import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training import job_for


def hold(rank: int, world_size: int, strategies: list[Any], folder: str) -> list[list[dict[str, int]]]:
    """For each strategy the numbers that a rank holds by what they are: once prepared, after a backward pass in the
    middle of a step, and after the step."""
    import torch

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    catalog, answers = Catalog(load_plugins()), []
    for strategy in strategies:
        job = job_for(strategy, Path(folder), world_size, 1, 2)
        engine = catalog.create("strategy", job.plan.strategy or {}).engine(job.placement, rank)
        engine.prepare(build_model(job, engine), optimizer_maker(job.plan))
        held = [elements(engine.holdings())]
        for last in (False, True):
            logits = engine.model(input_ids=torch.arange(6)[None]).logits
            engine.backward(logits.square().mean(), last=last)
            if not last:
                held.append(elements(engine.holdings()))
        engine.step()
        held.append(elements(engine.holdings()))
        engine.finish()
        answers.append(held)
    return answers


def elements(holdings: dict[str, list[Any]]) -> dict[str, int]:
    """How many numbers each kind of tensors holds together."""
    return {kind: sum(t.numel() for t in tensors if t is not None) for kind, tensors in holdings.items()}
