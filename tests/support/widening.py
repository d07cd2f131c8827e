"""What a rank does in tests of added tokens; here, because a spawned process has to import it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from training import job_for


def widen(rank: int, world_size: int, cases: list[tuple[Any, str, int]]) -> list[dict[str, Any]]:
    """For each (strategy, folder, entries of the tokenizer) the embeddings with which training begins, by name; values
    on rank 0."""
    import torch

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    catalog, answers = Catalog(load_plugins()), []
    for strategy, folder, vocabulary in cases:
        job = dataclasses.replace(job_for(strategy, Path(folder), world_size, 1, 1), vocabulary=vocabulary)
        engine = catalog.create("strategy", job.plan.strategy or {}).engine(job.placement, rank)
        torch.manual_seed(1000 + rank)  # what is made up rather than computed would differ between ranks and runs
        engine.prepare(build_model(job, engine), optimizer_maker(job.plan))
        names = [name for name in engine.shapes() if "embed_tokens" in name or "lm_head" in name]
        gathered = engine.gathered(names, torch.float32)
        embeddings = (engine.bare_model.get_input_embeddings(), engine.bare_model.get_output_embeddings())
        answers.append(
            {
                "values": {name: tensor.numpy() for name, tensor in gathered.items()},
                "shapes": {name: engine.shapes()[name] for name in names},
                "tied": embeddings[0].weight is embeddings[1].weight,
                "entries": engine.bare_model.config.vocab_size,
            }
        )
        engine.finish()
    return answers
