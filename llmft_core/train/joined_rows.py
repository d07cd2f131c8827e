"""Packed rows that go through a model behind one another, as one: FlashAttention is told where each sample begins."""

from __future__ import annotations

import inspect

import torch


def joins_rows(bare_model: torch.nn.Module) -> bool:
    """Whether packed rows are to go through a model as one.

    FlashAttention finds the samples by their positions in a batch of one row only, and in larger ones lets them see
    each other without a word; it costs nothing there to join the rows. Under SDPA it would cost a mask of the whole
    batch squared.
    """
    return "flash" in (getattr(bare_model.config, "_attn_implementation", None) or "")


def takes_lengths(bare_model: torch.nn.Module) -> bool:
    """Whether a model that joins rows is given `lengths` too: where its forward pass hands on what it does not know
    itself, as all of transformers' own do that have FlashAttention."""
    if not joins_rows(bare_model):
        return False
    parameters = inspect.signature(bare_model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def lengths(position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """What FlashAttention is called with for a row of samples whose positions restart, (1, T) int64 on the host: where
    each begins and the last one ends, (samples + 1,) int32 on the host too, and the longest one's tokens.

    They are transformers' own arguments of a forward pass (`FlashAttentionKwargs`). Without them every layer looks for
    the samples in the positions on the device, three times, and the host waits for each answer.
    """
    row = position_ids.flatten()
    begins = torch.diff(row, prepend=row[:1] - 2) != 1
    bounds = torch.cat([begins.nonzero().squeeze(1), torch.tensor([row.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
