"""The loss, and the one place where labels are shifted."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from llmft_core.data.batches import MicroBatch
from llmft_core.values import IGNORED_LABEL


@dataclass(frozen=True)
class Call:
    """How a model is called. `keeps`: it can compute its output layer at chosen positions only, which leaves out
    prompts and padding; float32 logits of a long batch cost more memory than anything else. `flat`: packed rows go
    through it behind one another, as one."""

    keeps: bool
    flat: bool

    @classmethod
    def of(cls, bare_model: torch.nn.Module) -> Call:
        """As a transformers model wants it.

        FlashAttention finds the samples by their positions in a batch of one row only, and in larger ones lets them
        see each other without a word; it costs nothing there to join the rows. Under SDPA it would cost a mask of the
        whole batch squared.
        """
        keeps = "logits_to_keep" in inspect.signature(bare_model.forward).parameters
        attention = getattr(bare_model.config, "_attn_implementation", None) or ""
        return cls(keeps, flat="flash" in attention)


def micro_batch_loss(model: torch.nn.Module, batch: MicroBatch, device: torch.device, call: Call) -> torch.Tensor:
    """`loss_sum` of a micro-batch, on the device."""
    arrays = [batch.input_ids, batch.labels, *([] if batch.position_ids is None else [batch.position_ids])]
    input_ids, labels, *position_ids = map(torch.from_numpy, arrays)
    if position_ids and call.flat:
        # No label crosses from row to row: nothing predicts the first token of a sample.
        input_ids, labels, position_ids = input_ids.view(1, -1), labels.view(1, -1), [position_ids[0].view(1, -1)]
    positions = position_ids[0].to(device) if position_ids else None
    return loss_sum(model, input_ids.to(device), labels, positions, keeps=call.keeps)


def loss_sum(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    keeps: bool,
) -> torch.Tensor:
    """Cross-entropy summed over the trained tokens of a micro-batch, in nats, 0-d float32, on the model's device.

    `input_ids` is (B, T) int64 on the model's device, `labels` (B, T) int64 on the CPU, where choosing the trained
    positions does not make the host wait for the GPU; the label of a token is predicted from the position before it.
    `position_ids` is (B, T) int64 on the model's device where rows are packed.

    Rows are padded on the right and attention is causal, so padding cannot reach a real token and no mask is needed.
    Packed samples are kept apart by positions that restart, and by these alone: with a mask, or with a cache of keys,
    transformers would not look at them.
    """
    inputs = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    targets = labels[:, 1:]  # (B, T-1)
    if keeps:
        positions = (targets != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)  # (K,) columns some row is trained at
        if positions.numel() == 0:
            positions = positions.new_zeros(1)  # nothing is trained, but every rank takes part in the backward pass
        targets = targets[:, positions]
        logits = model(**inputs, logits_to_keep=positions.to(input_ids.device)).logits  # (B, K, V)
    else:
        logits = model(**inputs).logits[:, :-1]  # (B, T-1, V)
    targets = targets.to(logits.device)
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
