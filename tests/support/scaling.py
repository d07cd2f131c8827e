"""What a rank does in tests of fp16; here, because a spawned process has to import it."""

from __future__ import annotations

from typing import Any

from resuming import train_on


def let_cpu_compute_in_fp16() -> None:
    """DeepSpeed's fp16 needs nothing of a GPU: it asks whether there are fast kernels, and PyTorch has slow ones."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def train_in_fp16(rank: int, cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """`train_on`, where a CPU may compute in fp16."""
    let_cpu_compute_in_fp16()
    return train_on(rank, cases)
