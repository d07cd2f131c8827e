"""The loss, and the one place where labels are shifted."""

from __future__ import annotations

import inspect

import torch
from torch.nn.functional import cross_entropy

from llmft_core.values import IGNORED_LABEL


def loss_sum(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, *, keeps: bool) -> torch.Tensor:
    """Cross-entropy summed over the trained tokens of a micro-batch, in nats, 0-d float32, on the model's device.

    `input_ids` is (B, T) int64 on the model's device, `labels` (B, T) int64 on the CPU, where choosing the trained
    positions does not make the host wait for the GPU; the label of a token is predicted from the position before it.
    `keeps`: the model can compute its output layer at chosen positions only, which leaves out prompts and padding;
    float32 logits of a long batch cost more memory than anything else.

    Rows are padded on the right and attention is causal, so padding cannot reach a real token and no mask is needed.
    """
    targets = labels[:, 1:]  # (B, T-1)
    if keeps:
        positions = (targets != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)  # (K,) columns some row is trained at
        if positions.numel() == 0:
            positions = positions.new_zeros(1)  # nothing is trained, but every rank takes part in the backward pass
        targets = targets[:, positions]
        positions = positions.to(input_ids.device)
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=positions).logits  # (B, K, V)
    else:
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]  # (B, T-1, V)
    targets = targets.to(logits.device)
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def keeps_logits(bare_model: torch.nn.Module) -> bool:
    """Whether a transformers model takes `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(bare_model.forward).parameters
