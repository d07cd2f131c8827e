"""Which way a model's loss is computed, tried on the model itself before training.

What a model does with its output layer is its own affair: it may scale logits, cap them, mask some, or have a layer of
another kind. Of the ways that give the loss of all logits, the one that takes the least memory is chosen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from llmft_core.extensions import Engine
from llmft_core.train.job import Job
from llmft_core.train.loss import loss_sum
from llmft_core.train.output_layer import OutputLayer, Way
from llmft_core.values import IGNORED_LABEL

ROWS, TOKENS = 2, 12
"""The batch on which the ways are tried."""

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
"""How much of the loss, or of the largest logit, may differ: the ways round in another order, and in another type."""

LARGEST = 100.0
"""Numbers between minus this and this show what a model makes of those of its output layer."""


def find_output_layer(job: Job, engine: Engine, device: torch.device) -> tuple[OutputLayer, str]:
    """The output layer with its way, the same on all ranks, and what a user should know of it or "". Collective."""
    output = OutputLayer(engine.bare_model)
    tokens = max(2, min(TOKENS, job.plan.context_length))
    ids = torch.arange(1, ROWS * tokens + 1).view(ROWS, tokens) * 7 % job.vocabulary
    labels = torch.where(ids % 2 == 0, ids, IGNORED_LABEL)
    labels[:, -1] = ids[:, -1]  # whatever the vocabulary is, something is trained
    ids, tolerance = ids.to(device), TOLERANCE[job.placement.precision]

    def same_loss(way: Way) -> bool:
        output.way = way
        loss = loss_sum(engine.model, ids, labels, None, output)
        return agreed((loss - expected).abs() / expected.abs(), tolerance)

    engine.model.eval()
    with torch.no_grad():
        expected = loss_sum(engine.model, ids, labels, None, output)
        usual, difference = observe(engine, ids, output)
        plain = type(output.layer) is torch.nn.Linear
        if not (usual and ((agreed(difference, tolerance) and plain and same_loss("loss")) or same_loss("positions"))):
            output.way = "all"
    engine.model.train()
    name = type(engine.bare_model).__name__
    if output.way == "all":
        return output, f"{name}: logits are computed of prompts and padding too, for its output layer is unusual"
    if output.way == "positions":
        return output, f"{name}: all logits of a micro-batch are in memory at once, for its output layer is unusual"
    return output, ""


def observe(engine: Engine, ids: torch.Tensor, output: OutputLayer) -> tuple[bool, torch.Tensor]:
    """Whether the model calls its output layer once, for all positions, and makes one logit of each number; and how
    much of the largest logit they differ from what `output.shaping` makes of the numbers. Collective."""
    unknown = torch.full((), torch.inf, device=ids.device)
    if output.layer is None:
        return False, unknown
    seen: list[tuple[torch.Tensor, bool]] = []

    def show(layer: torch.nn.Module, inputs: tuple[Any, ...], numbers: torch.Tensor) -> torch.Tensor:
        """Numbers of a wide range in place of the layer's own, whose range may be too narrow to show a cap."""
        shown = torch.linspace(-LARGEST, LARGEST, numbers.numel(), device=numbers.device).view(numbers.shape)
        seen.append((shown.to(numbers.dtype), bool(inputs) and inputs[0].shape[:-1] == ids.shape))
        return seen[-1][0]

    hook = output.layer.register_forward_hook(show)
    logits = engine.model(input_ids=ids, use_cache=False).logits
    hook.remove()
    if len(seen) != 1 or not seen[0][1] or logits.shape != seen[0][0].shape:
        return False, unknown
    expected = output.shaping.logits(seen[0][0].float())
    return True, (logits.float() - expected).abs().max() / expected.abs().max()


def agreed(difference: torch.Tensor, tolerance: float) -> bool:
    """Whether it is within the tolerance on every rank; what is not a number is not. Collective."""
    fails = (~(difference <= tolerance)).float()
    dist.all_reduce(fails, op=dist.ReduceOp.MAX)
    return not bool(fails)
