"""A model's output layer, told in each forward pass at which positions it is wanted.

Logits take more of a batch's memory than anything else, and prompts and padding need none. The model's own forward is
called, through the strategy's wrapper and with all hooks; only its output layer does something else meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llmft_core.train.chunked_loss import Shaping, chunked_loss

Way = Literal["loss", "positions", "all"]
"""What the output layer gives. `loss`: the loss instead of logits, chunk by chunk. `positions`: its numbers at the
wanted positions alone, of which the model makes logits. `all`: those at all positions."""


@dataclass(frozen=True)
class Wanted:
    """`positions` (N,) int64 count the (B·T) positions of a batch that predict something, `targets` (N,) int64 are what
    they should predict. Both on the model's device."""

    positions: torch.Tensor
    targets: torch.Tensor


class OutputLayer:
    """The output layer of a model that a strategy has prepared; None: the model has none of its own."""

    def __init__(self, bare_model: torch.nn.Module) -> None:
        self.layer = layer_of(bare_model)
        self.shaping = Shaping.of(bare_model.config)
        self.way: Way = "all"
        self._loss: torch.Tensor | None = None
        self._wanted: Wanted | None = None
        if self.layer is not None:
            self._forward = self.layer.forward
            self.layer.forward = self._forward_wanted
            # After the strategy's own hooks: ZeRO-3's make an output of which the backward pass gathers the weights.
            self.layer.register_forward_hook(self._remember)

    @contextmanager
    def at(self, wanted: Wanted) -> Iterator[None]:
        """A context in which a forward pass computes what is wanted alone. Way `loss`: `taken_loss` has it afterwards,
        and the logits mean nothing. Way `positions`: logits are (1, N, V)."""
        self._loss, self._wanted = None, wanted
        try:
            yield
        finally:
            self._wanted = None

    def taken_loss(self) -> torch.Tensor:
        """The loss of the forward pass that is just over, 0-d float32. It is not kept here: with its graph, which holds
        the parameters, it would be a circle that no garbage collection sees."""
        loss, self._loss = self._loss, None
        assert loss is not None
        return loss

    def _forward_wanted(self, hidden: torch.Tensor, *others: Any, **named: Any) -> Any:
        """In place of the layer's own; `hidden` is (B, T, H)."""
        if self._wanted is None or self.way == "all":
            return self._forward(hidden, *others, **named)
        states = hidden.flatten(0, 1)  # (B·T, H)
        if self.way == "positions":
            return self._forward(states.index_select(0, self._wanted.positions).unsqueeze(0), *others, **named)
        layer: Any = self.layer
        loss = chunked_loss(
            states, layer.weight, layer.bias, self._wanted.positions, self._wanted.targets, self.shaping
        )
        return loss.view(1, 1, 1)  # as many dimensions as logits have: the model goes on with it

    def _remember(self, layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if self._wanted is not None and self.way == "loss":
            self._loss = output.view(())


def layer_of(bare_model: torch.nn.Module) -> torch.nn.Module | None:
    """The module that makes numbers for every entry of the vocabulary of hidden states."""
    getter = getattr(bare_model, "get_output_embeddings", None)
    layer: torch.nn.Module | None = getter() if getter is not None else None
    copies = list(getattr(layer, "modules_to_save", {}).values())  # peft trains a copy of it, and calls that alone
    return copies[0] if len(copies) == 1 else layer
