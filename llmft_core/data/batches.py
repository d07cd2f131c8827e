"""Rows → micro-batches: a global batch is cut the same way whatever the world size is; each rank takes its share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmft_core.data.order import Rows
from llmft_core.plan import RunPlan
from llmft_core.values import IGNORED_LABEL, Placement

if TYPE_CHECKING:
    from llmft_core.data.prepare import TokenTable

SHORTEST = 2
"""Tokens a micro-batch is wide at least: a position and its target."""


@dataclass(frozen=True)
class MicroBatch:
    """All arrays are (B, T) int64, padded on the right. `labels` are −100 at the first token of every sample, which
    nothing predicts. `position_ids` restart at 0 at every sample and where the padding begins; None where no row
    holds more than one sample, so that the model counts by itself. `index` counts the micro-batches of the global
    batch, so that dropout is a function of the position and not of the rank."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64] | None
    index: int


@dataclass(frozen=True)
class Form:
    """What micro-batches look like: the padding token, whether rows are packed, and how wide they are at least."""

    pad_id: int
    packed: bool
    width: int = SHORTEST  # tokens

    @classmethod
    def of(cls, plan: RunPlan, pad_id: int) -> Form:
        """The form that a plan wants."""
        width = plan.context_length if plan.data.pad_to_context else 0
        return cls(pad_id, plan.data.packing != "none", max(SHORTEST, width))


def steps_of(rows: int, global_batch: int, *, drop_last: bool) -> int:
    """Optimizer steps in an epoch of so many rows. An incomplete last one weighs as many tokens as it has, unless it
    is dropped."""
    return rows // global_batch if drop_last else -(-rows // global_batch)


def arrange(table: TokenTable, rows: Rows, micro_batch: int) -> npt.NDArray[np.int64]:
    """The micro-batches of a global batch as numbers of its rows, (count, micro_batch): rows of like length together,
    the longest first.

    Neighbours in length waste little padding, ranks that take every W-th micro-batch are done at the same time, and
    what is too large for the memory fails in the first forward pass. The gradient is a sum over all rows, so the
    order within a step does not change it.
    """
    return np.argsort(-rows.lengths(table.lengths), kind="stable").reshape(-1, micro_batch)


def collate(table: TokenTable, rows: Rows, numbers: npt.NDArray[np.int64], index: int, form: Form) -> MicroBatch:
    """Some rows of a global batch → one micro-batch. All tokens are copied at once, by their places there and here."""
    found = [rows.samples[rows.bounds[number] : rows.bounds[number + 1]] for number in numbers]
    samples = np.concatenate(found)
    row_of_sample = np.repeat(np.arange(len(found)), [len(row) for row in found])
    lengths = table.lengths[samples].astype(np.int64)
    used = np.bincount(row_of_sample, weights=lengths, minlength=len(found)).astype(np.int64)  # tokens of each row
    width = max(form.width, int(used.max()))
    begins = np.cumsum(lengths) - lengths  # of each sample, where all of them lie behind one another
    in_row = begins - (np.cumsum(used) - used)[row_of_sample]
    positions = np.arange(lengths.sum()) - np.repeat(begins, lengths)  # of each token in its sample
    there = np.repeat(table.offsets[samples], lengths) + positions
    here = np.repeat(row_of_sample * width + in_row, lengths) + positions

    input_ids = np.full((len(found), width), form.pad_id, dtype=np.int64)
    labels = np.full((len(found), width), IGNORED_LABEL, dtype=np.int64)
    ids = table.ids[there]
    trained = (table.trained[there] != 0) & (positions > 0)
    input_ids.flat[here] = ids
    labels.flat[here[trained]] = ids[trained]
    position_ids = None
    if form.packed:
        position_ids = np.arange(width) - used[:, np.newaxis]  # the padding is a segment of its own
        position_ids.flat[here] = positions
    return MicroBatch(input_ids, labels, position_ids, index)


def rank_micro_batches(
    table: TokenTable, rows: Rows, placement: Placement, rank: int, form: Form
) -> Iterator[MicroBatch]:
    """One rank's share of a global batch: micro-batches rank, rank + W, rank + 2 W, …"""
    micro_batches = arrange(table, rows, placement.micro_batch)
    for index in range(rank, len(micro_batches), placement.world_size):
        yield collate(table, rows, micro_batches[index], index, form)


def trained_tokens(table: TokenTable, rows: Rows) -> int:
    """Trained tokens of a global batch after the shift; every rank computes it alone, so no collective is needed."""
    return int(table.trained_counts[rows.samples].sum())


def real_tokens(table: TokenTable, rows: Rows) -> int:
    """Tokens of a global batch without padding."""
    return int(table.lengths[rows.samples].sum())


def padding_waste(lengths: npt.NDArray[np.int64], global_batch: int, micro_batch: int, width: int) -> float:
    """Share of an epoch's positions that are padding: 0.2 means that one in five is computed for nothing.

    `lengths` (rows,) are the tokens of its rows in their order, `width` is that of a micro-batch at least.
    """
    steps = steps_of(len(lengths), global_batch, drop_last=False)
    filled = np.zeros(steps * global_batch, dtype=np.int64)
    filled[: len(lengths)] = lengths
    arranged = np.sort(filled.reshape(steps, global_batch), axis=1)[:, ::-1]
    widest = np.maximum(arranged.reshape(-1, micro_batch).max(axis=1), width)
    return 1 - float(lengths.sum()) / float(widest.sum() * micro_batch)
