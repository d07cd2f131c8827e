"""Whether rows are packed: transformers reads it back from the positions in every forward pass, where the host waits
until a GPU has done all that it was given. The host has made the rows, and tells it instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def told(*, packed: bool) -> Iterator[None]:
    """A context around forward passes without a mask and without a cache. `packed`: a row may hold several samples,
    whose positions restart."""
    from transformers import masking_utils

    original = getattr(masking_utils, "find_packed_sequence_indices", None)
    if original is None:  # another version looks in its own way, as right (tests/core/test_micro_batches.py sees it)
        yield
        return
    masking_utils.find_packed_sequence_indices = samples_of if packed else no_samples
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def samples_of(position_ids: torch.Tensor) -> torch.Tensor:
    """The number of the sample that each token of a row belongs to; both (B, T) int64."""
    before = position_ids[:, :1] - 1
    return (torch.diff(position_ids, prepend=before, dim=-1) != 1).cumsum(-1)


def no_samples(position_ids: torch.Tensor) -> None:
    """Each row is one sample."""
