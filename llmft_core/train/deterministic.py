"""Kernels that give the same bits every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS reads it when it is first used; PyTorch insists on it
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # transformers hands it to FlashAttention's backward pass
}


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Where wanted, an operation without a deterministic kernel is an error within, not a different number.

    Source: PyTorch's notes on reproducibility. On CPU PyTorch's kernels are deterministic for one number of threads.
    """
    if not wanted:
        yield
        return
    os.environ.update(VARIABLES)
    # Else PyTorch fills uninitialised memory with NaN, also the padding of DeepSpeed's buffers, which is summed.
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        for name in VARIABLES:
            os.environ.pop(name, None)
