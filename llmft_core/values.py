"""The plain values that travel between the parts: frozen, standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]

IGNORED_LABEL = -100
"""The label of a token that is not trained: the `ignore_index` of PyTorch's cross-entropy."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `opening` and `closing` are special tokens around the text, or nothing. Whether the turn is trained covers the
    text and the closing token: the model learns to answer and to stop, never to open its own turn.
    """

    role: str
    text: str
    trained: bool
    opening: str = ""
    closing: str = ""


@dataclass(frozen=True)
class Conversation:
    """A row as a dialogue: its messages in order.

    `template`: to be written in the model's own chat template, so its messages have no tokens of their own. `starts`:
    it begins as it should, with a token of its own or without, so no beginning-of-sequence token is put before it.
    """

    messages: tuple[Message, ...]
    template: bool = False
    starts: bool = False


@dataclass(frozen=True)
class Role:
    """Who speaks in the rows of a format, and the tokens around what is said. `trained`: unless the plan says
    otherwise. `served_as` is what servers call it in a chat: system, user or assistant; empty: by its name alone."""

    name: str
    opening: str = ""
    closing: str = ""
    trained: bool = False
    served_as: str = ""


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used: the field it lies in and the reason, in one line each."""

    field: str
    reason: str


@dataclass(frozen=True)
class Origin:
    """Where a row came from: the file (or generator) and the line, counted from 1."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class EncodedExample:
    """A row as the model sees it. Both have the same length; a label is the token's own id, or −100 where it is not
    trained. The shift by one position happens in the loss, nowhere else."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class WorkerRange:
    """How many workers a run may have. Where both numbers are equal, it has so many and waits until it does."""

    fewest: int
    most: int

    @property
    def sizes(self) -> range:
        """Every number that there may be."""
        return range(self.fewest, self.most + 1)

    def __str__(self) -> str:
        return str(self.most) if self.fewest == self.most else f"{self.fewest}:{self.most}"


def fitting_micro_batch(share: int, largest: int) -> int:
    """The largest micro-batch of at most `largest` rows that divides a worker's share of the global batch."""
    return max(rows for rows in range(1, min(share, largest) + 1) if share % rows == 0)


@dataclass(frozen=True)
class Placement:
    """How one training job is laid out, equal on all ranks.

    `micro_batch` is rows in one forward pass of one rank; `accumulation` is forward passes of one rank in one optimizer
    step; so the global batch is `world_size × micro_batch × accumulation` rows.
    """

    world_size: int
    device: Device
    precision: Precision
    micro_batch: int
    accumulation: int
    max_grad_norm: float
    hidden_size: int = 0
    """Width of the model's hidden states, by which buffers are sized; 0: not known (yet)."""

    @property
    def global_batch(self) -> int:
        """Rows in one optimizer step."""
        return self.world_size * self.micro_batch * self.accumulation

    def for_world_size(self, world_size: int, micro_batch: int) -> Placement:
        """The same global batch on another number of ranks, which divides it: in the largest micro-batches of at most
        `micro_batch` rows that divide a rank's share."""
        share = self.global_batch // world_size
        rows = fitting_micro_batch(share, micro_batch)
        return replace(self, world_size=world_size, micro_batch=rows, accumulation=share // rows)


@dataclass(frozen=True)
class Setting:
    """What a training method is told of the run beside the model; equal on all ranks."""

    placement: Placement
    partitioned: bool
    """Whether a rank holds only a part of each weight (`Strategy.partitions_weights`)."""
    special_ids: tuple[int, ...]
    """Token ids whose embeddings have to be trained: those of the dataset's special tokens, and all that the
    model had no row for."""
    seed: int
    base: str
    """What others find the base model by: its hub id, else its folder, URI or short name."""


@dataclass(frozen=True)
class Adapter:
    """What a checkpoint holds in the place of a whole model."""

    tensors: Mapping[str, str]
    """Trained parameter of the model → its name in `adapter_model.safetensors`."""
    config: Mapping[str, Any]
    """`adapter_config.json`."""


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did. `grad_norm` is the global L2 norm before clipping; `applied` is False where the
    step was skipped because a gradient was not finite."""

    grad_norm: float
    applied: bool


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of a model: all of them, and those that take part in a matrix product for each token."""

    parameters: int
    matmul_parameters: int

    def flops_per_token(self) -> int:
        """Training FLOPs a token without attention scores: 6 per weight of a product (2 forward, 4 backward).

        Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1.
        """
        return 6 * self.matmul_parameters
