"""What a rank does in tests of loading; here, because a spawned process has to import it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

from training import job_for

WHOLE = 0  # a vocabulary for which no embedding is widened


def load_on_rank(rank: int, world_size: int, cases: list[tuple[str, str, int]]) -> bytes:
    """For each (folder, precision, vocabulary) what a model is after loading under ZeRO-3; weights on rank 0. By
    `torch.save`: tensors in a queue would live only as long as this process."""
    import torch

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.train import model as loading
    from llmft_core.train.optimizer import optimizer_maker
    from llmft_core.weights.tensors import TensorFiles

    opened: list[TensorFiles] = []

    class Counting(TensorFiles):
        def __init__(self, folder: Path) -> None:
            opened.append(self)
            super().__init__(folder)

    loading.TensorFiles = Counting
    catalog = Catalog(load_plugins())
    answers: list[Any] = []
    for folder, precision, vocabulary in cases:
        job = job_for("zero-3", Path(folder), world_size, 1, 1, precision=precision)
        job = dataclasses.replace(job, vocabulary=vocabulary)
        engine = catalog.create("strategy", job.plan.strategy).engine(job.placement, rank)
        warnings: list[str] = []
        torch.manual_seed(rank)  # what is not loaded would differ between ranks, and from the reference
        model = loading.build_model(job, engine, warnings.append)
        answer = {
            "warnings": warnings,
            "read": opened[-1].bytes_read,
            "padding": [padding_of(parameter, rank) for parameter in model.parameters()],
            "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
            "generation": model.generation_config.to_dict(),
        }
        engine.prepare(model, optimizer_maker(job.plan))
        answer["weights"] = engine.gathered(list(engine.shapes()), engine.parameter_dtype)
        answers.append(answer)
        engine.finish()
    file = io.BytesIO()
    torch.save(answers, file)
    return file.getvalue()


def padding_of(parameter: Any, rank: int) -> list[float]:
    """What this rank's partition holds behind the parameter's last element; [] for a widened embedding, which is
    partitioned only later."""
    if not hasattr(parameter, "ds_tensor"):
        return []
    part = parameter.ds_tensor
    return part[max(0, parameter.ds_numel - rank * len(part)) :].tolist()
