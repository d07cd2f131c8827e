"""What a rank does in tests of fp16; here, because a spawned process has to import it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from resuming import train_on
from training import VOCABULARY, job_for, prepared


def let_cpu_compute_in_fp16() -> None:
    """DeepSpeed's fp16 needs nothing of a GPU: it asks whether there are fast kernels, and PyTorch has slow ones."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def train_in_fp16(rank: int, cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """`train_on`, where a CPU may compute in fp16."""
    let_cpu_compute_in_fp16()
    return train_on(rank, cases)


def overflow(rank: int, strategy: str, base: str, times: int) -> dict[str, Any]:
    """So many steps whose gradient is not finite, and one whose gradient is: which of them were applied, the loss
    scale after each, and the counters at the end."""
    import torch

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins

    let_cpu_compute_in_fp16()
    engine = prepared(job_for(strategy, Path(base), 1, 2, 1, precision="fp16"), rank, Catalog(load_plugins()))
    ids = torch.arange(18).view(2, 9) % VOCABULARY
    applied, scales = [], []
    for factor in [math.inf] * times + [1.0]:
        engine.set_learning_rate(1e-3)
        engine.backward(engine.model(input_ids=ids, use_cache=False).logits.float().mean() * factor, last=True)
        applied.append(engine.step().applied)
        scales.append(engine.counters()["loss_scale"])
    answer = {"applied": applied, "scales": scales, "counters": engine.counters()}
    engine.finish()
    return answer
