"""In which order samples are trained: a pure function of the seed and the epoch, whatever the number of workers.

A sample is a row of the token table. A row of a batch holds one sample, or several that are packed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmft_core.data.packing import best_fit, deal
from llmft_core.plan import RunPlan

if TYPE_CHECKING:
    from llmft_core.data.prepare import PreparedData, TokenTable

LARGEST_DENOMINATOR = 1_000_000
"""Weights are taken as fractions with at most this denominator: 0.3 means 3/10, not the nearest binary number."""


@dataclass(frozen=True)
class Rows:
    """Rows of batches in the order in which they are trained: those of an epoch, or of a global batch. Row r has the
    samples `samples[bounds[r]:bounds[r + 1]]`. `samples` is (samples,) int32, `bounds` (rows + 1,) int32."""

    samples: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def step(self, number: int, global_batch: int) -> Rows:
        """The global batch of an optimizer step of this epoch. The last one is filled up with rows without samples, so
        that every rank has its micro-batches."""
        bounds = self.bounds[number * global_batch : (number + 1) * global_batch + 1]
        filled = np.full(global_batch + 1, bounds[-1])
        filled[: len(bounds)] = bounds
        return Rows(self.samples[bounds[0] : bounds[-1]], filled - bounds[0])

    def lengths(self, of_samples: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Tokens (rows,) of each row, from those of each sample of the table."""
        ends = np.concatenate([[0], np.cumsum(of_samples[self.samples], dtype=np.int64)])
        return np.diff(ends[self.bounds])


@dataclass(frozen=True)
class Mix:
    """Where each sample comes from, `source_of_row` (samples,), and how often an epoch passes over each source."""

    source_of_row: npt.NDArray[np.integer]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Order:
    """The order of all epochs of one split. `lengths` (samples,) is in tokens; `capacity` is that of a packed row in
    tokens, 0 where nothing is packed; `mix` is None where there is one source that is seen once an epoch."""

    lengths: npt.NDArray[np.int32]
    seed: int
    capacity: int
    mix: Mix | None = None

    @classmethod
    def of(cls, table: TokenTable, plan: RunPlan, mix: Mix | None = None) -> Order:
        """The order in which a plan goes through a table."""
        return cls(table.lengths, plan.seed, plan.context_length if plan.data.packing == "best-fit" else 0, mix)

    @property
    def always_alike(self) -> bool:
        """Whether each epoch has the same samples, in another order."""
        return self.mix is None or all(float(weight).is_integer() for weight in self.mix.weights)

    def epoch(self, number: int) -> Rows:
        """Epoch `number`, counted from 0: each of its samples once, dealt to rows and shuffled anew."""
        random = np.random.default_rng([self.seed, number])
        samples = self._samples(number)
        if not self.capacity:
            return Rows(random.permutation(samples), np.arange(len(samples) + 1, dtype=np.int32))
        if self.mix is None:
            return Rows(*deal(self.lengths, self.capacity, random))
        dealt, bounds = deal(self.lengths[samples], self.capacity, random)
        return Rows(samples[dealt], bounds)

    def rows(self, number: int) -> int:
        """Rows of an epoch."""
        if not self.capacity and self.mix is None:
            return len(self.lengths)
        samples = self._samples(number)
        return packed_rows(self.lengths[samples], self.capacity) if self.capacity else len(samples)

    def _samples(self, number: int) -> npt.NDArray[np.int32]:
        if self.mix is None:
            return np.arange(len(self.lengths), dtype=np.int32)
        return epoch_rows(self.mix.source_of_row, self.mix.weights, self.seed, number).astype(np.int32)


def mix_of(data: PreparedData) -> Mix | None:
    """The mix of the training rows; None where each file is seen once an epoch."""
    weights = data.report.splits["train"].weights
    return None if all(weight == 1 for weight in weights) else Mix(data.train.files, weights)


def epoch_rows(
    source_of_row: npt.NDArray[np.integer], weights: Sequence[float], seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """The table rows of an epoch, where `weights[s]` is how many passes over source s an epoch makes.

    A whole pass has each row of the source once. The rest, a fraction of a pass, goes on where the epoch before ended
    in a shuffled round of the source; with 0.5 an epoch has one half and the next epoch the other. So at the end of
    any epoch two rows of a source have been seen equally often, or one of them once more.
    """
    found = []
    for source, weight in enumerate(weights):
        rows = np.flatnonzero(source_of_row == source)
        passes, part = divmod(Fraction(weight).limit_denominator(LARGEST_DENOMINATOR), 1)
        found.append(np.repeat(rows, passes))
        at, end = (int(number * part * len(rows)) for number in (epoch, epoch + 1))
        while at < end:
            round_, start = divmod(at, len(rows))
            shuffled = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(source, round_))).permutation(rows)
            found.append(shuffled[start : start + end - at])
            at += len(found[-1])
    return np.concatenate(found)


def packed_rows(lengths: npt.NDArray[np.int32], capacity: int) -> int:
    """Rows of `capacity` tokens into which samples of these lengths (samples,) are packed."""
    return sum(kind.count for kind in best_fit(np.bincount(lengths), capacity))
