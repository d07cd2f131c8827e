"""What is shown of a dataset: rows as tokens, and figures about them. Made in `data`, drawn in `report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

Pick = Literal["first", "random", "longest", "shortest", "least-trained"]
"""Which rows are shown."""


@dataclass(frozen=True)
class Piece:
    """One token of a row."""

    id: int
    text: str
    """What it writes, exactly. Empty for a token that is only part of a character: the token that completes the
    character writes it."""
    name: str
    """The vocabulary's own spelling (`▁How`, `<0xE6>`), which stands for a token without a text."""
    trained: bool
    """Whether the loss counts it. The first token of a row is predicted by nothing."""
    special: bool


@dataclass(frozen=True)
class RowView:
    """A row as the model sees it. `number` counts the rows of its split from 1."""

    number: int
    origin: str
    pieces: tuple[Piece, ...]

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts."""
        return sum(piece.trained for piece in self.pieces)

    @property
    def ends_trained(self) -> bool:
        """Whether the model learns to end here."""
        return self.pieces[-1].trained


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind in a row of a micro-batch."""

    kind: str
    """`untrained`, `trained` or `padding`."""
    tokens: int


@dataclass(frozen=True)
class BatchView:
    """The layout of one micro-batch: the rows in it, each as (label, runs). All rows are `width` tokens wide."""

    width: int
    rows: tuple[tuple[str, tuple[Run, ...]], ...]

    @property
    def padding(self) -> float:
        """Share of the positions that are padding."""
        return sum(run.tokens for _, runs in self.rows for run in runs if run.kind == "padding") / (
            self.width * len(self.rows)
        )


def round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50 and so on: steps of an axis that people can read."""
    return (digit * 10**power for power in count() for digit in (1, 2, 5))


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie in [`first` + i × `step`, `first` + (i + 1) × `step`)."""

    first: int
    step: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Percentiles:
    """Of integers, by the nearest rank: each is a value that occurs."""

    least: int
    p5: int
    p25: int
    median: int
    p75: int
    p90: int
    p95: int
    p99: int
    most: int
    mean: float


@dataclass(frozen=True)
class ContextFit:
    """What one context length would mean. Wastes are the share of computed positions that are padding; they are of
    what fits, so None where nothing does."""

    context: int  # tokens
    over: int  # rows that are longer
    over_share: float
    rows: int  # of the first epoch, of those that fit
    tokens: int  # of these rows
    steps: int  # optimizer steps of that epoch
    packed_rows: int  # rows of `context` tokens that hold them, packed best-fit
    packed_steps: int
    sorted: float | None  # unpacked: sorted within global batches, padded to the longest of each micro-batch
    packed: float | None
    full: float | None  # unpacked, every row padded to the context


@dataclass(frozen=True)
class TokenCount:
    """How often a token occurs."""

    id: int
    name: str
    text: str
    count: int


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens occur."""

    size: int  # ids that the tokenizer has, special tokens included
    used: int  # distinct ids that occur
    unknown: int | None  # unknown tokens that occur; None where the tokenizer has none
    special: tuple[TokenCount, ...]
    frequent: tuple[TokenCount, ...]  # without the special ones, the most frequent first


@dataclass(frozen=True)
class SplitStatistics:
    """One split, before any row is dropped or cut for its length."""

    source: str
    rows: int
    tokens: int
    trained_tokens: int
    ends_trained: float  # share of the rows whose last token is trained
    lengths: Percentiles  # tokens a row
    trained: Percentiles  # trained tokens a row
    histogram: Histogram  # of tokens a row
    contexts: tuple[ContextFit, ...]
    vocabulary: Vocabulary
