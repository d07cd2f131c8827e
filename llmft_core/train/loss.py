"""The loss, and the one place where labels are shifted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from llmft_core.data.batches import MicroBatch
from llmft_core.train.joined_rows import joins_rows, lengths, takes_lengths
from llmft_core.train.output_layer import OutputLayer, Wanted
from llmft_core.train.packed_mask import told
from llmft_core.values import IGNORED_LABEL


@dataclass(frozen=True)
class Call:
    """How a model is called. `output`: its output layer. `flat`: packed rows go through it behind one another, as
    one; `lengths`: their samples' lengths go with them."""

    output: OutputLayer
    flat: bool
    lengths: bool = False

    @classmethod
    def of(cls, output: OutputLayer, bare_model: torch.nn.Module) -> Call:
        """As its kind of attention wants it."""
        return cls(output, joins_rows(bare_model), takes_lengths(bare_model))


def micro_batch_loss(model: torch.nn.Module, batch: MicroBatch, device: torch.device, call: Call) -> torch.Tensor:
    """`loss_sum` of a micro-batch, on the device."""
    arrays = [batch.input_ids, batch.labels, *([] if batch.position_ids is None else [batch.position_ids])]
    input_ids, labels, *position_ids = map(torch.from_numpy, arrays)
    beside: dict[str, torch.Tensor | int] = {}
    if position_ids and call.flat:
        # No label crosses from row to row: nothing predicts the first token of a sample.
        input_ids, labels, position_ids = input_ids.view(1, -1), labels.view(1, -1), [position_ids[0].view(1, -1)]
        if call.lengths:
            beside = on_device(lengths(position_ids[0]), device)
    positions = sent(position_ids[0], device) if position_ids else None
    return loss_sum(model, sent(input_ids, device), labels, positions, call.output, beside)


def loss_sum(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None,
    output: OutputLayer,
    beside: Mapping[str, torch.Tensor | int] | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over the trained tokens of a micro-batch, in nats, 0-d float32, on the model's device.

    `input_ids` is (B, T) int64 on the model's device, `labels` (B, T) int64 on the CPU, where choosing the trained
    positions does not make the host wait for the GPU; the label of a token is predicted from the position before it.
    `position_ids` is (B, T) int64 on the model's device where rows are packed; `beside` is given to the model too.

    Rows are padded on the right and attention is causal, so padding cannot reach a real token and no mask is needed.
    Packed samples are kept apart by positions that restart, and by these alone: with a mask, or with a cache of keys,
    transformers would not look at them.
    """
    inputs: dict[str, torch.Tensor | int] = {"input_ids": input_ids, "use_cache": False, **(beside or {})}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    targets = torch.full_like(labels, IGNORED_LABEL)  # (B, T), by the position that predicts them
    targets[:, :-1] = labels[:, 1:]
    targets = targets.flatten()
    positions = (targets != IGNORED_LABEL).nonzero().squeeze(1)  # (N,)
    anything = positions.numel() > 0
    if not anything:
        positions = positions.new_zeros(1)  # nothing is trained, but every rank takes part in the backward pass
    targets = targets[positions].clamp(min=0)
    wanted = Wanted(sent(positions, input_ids.device), sent(targets, input_ids.device))
    with output.at(wanted), told(packed=position_ids is not None):
        logits = model(**inputs).logits
    if output.way == "loss":
        loss = output.taken_loss()
    else:
        logits = logits.flatten(0, 1)  # (N, V), or (B·T, V)
        logits = logits if output.way == "positions" else logits.index_select(0, wanted.positions)
        loss = cross_entropy(logits.float(), wanted.targets, reduction="sum")
    return loss if anything else loss * 0.0


def on_device(arguments: Mapping[str, torch.Tensor | int], device: torch.device) -> dict[str, torch.Tensor | int]:
    """Arguments of a forward pass, their tensors sent to the device."""
    return {name: sent(one, device) if isinstance(one, torch.Tensor) else one for name, one in arguments.items()}


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host, on the device; the host does not wait for what the device is still computing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
