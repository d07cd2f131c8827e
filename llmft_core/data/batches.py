"""Rows → micro-batches: a pure function of seed, epoch and step, the same global batches whatever the world size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmft_core.values import IGNORED_LABEL, Placement

if TYPE_CHECKING:
    from llmft_core.data.prepare import TokenTable

NO_ROW = -1
"""Fills a global batch at the end of an epoch: a row without tokens, so that every rank has its micro-batches."""

SHORTEST = 2
"""Tokens a micro-batch is wide at least: a position and its target."""


@dataclass(frozen=True)
class MicroBatch:
    """`input_ids` and `labels` are (B, T) int64, padded on the right to the longest row; `index` counts the
    micro-batches of the global batch, so that dropout is a function of the position and not of the rank."""

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    index: int


def steps_per_epoch(rows: int, global_batch: int) -> int:
    """Optimizer steps in one pass; the last one may hold fewer rows and weighs as many tokens as it has."""
    return -(-rows // global_batch)


def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The permutation (rows,) int64 of an epoch, counted from 0."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def step_rows(order: npt.NDArray[np.int64], step: int, global_batch: int) -> npt.NDArray[np.int64]:
    """The row numbers (global_batch,) of a step of the epoch, filled with NO_ROW."""
    rows = order[step * global_batch : (step + 1) * global_batch]
    return np.concatenate([rows, np.full(global_batch - len(rows), NO_ROW, dtype=np.int64)])


def arrange(table: TokenTable, rows: npt.NDArray[np.int64], micro_batch: int) -> npt.NDArray[np.int64]:
    """The micro-batches (count, micro_batch) of one global batch, rows of like length together, the longest first.

    Neighbours in length waste little padding, ranks that take every W-th micro-batch are done at the same time, and
    what is too large for the memory fails in the first forward pass. The gradient is a sum over all rows, so the
    order within a step does not change it.
    """
    lengths = np.array([table.length(int(row)) if row != NO_ROW else 0 for row in rows])
    ordered: npt.NDArray[np.int64] = rows[np.argsort(-lengths, kind="stable")]
    return ordered.reshape(-1, micro_batch)


def collate(table: TokenTable, rows: npt.NDArray[np.int64], index: int, pad_id: int) -> MicroBatch:
    """Token rows → one padded micro-batch."""
    found = [table.row(int(row)) if row != NO_ROW else None for row in rows]
    width = max([SHORTEST, *(len(row[0]) for row in found if row)])
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED_LABEL, dtype=np.int64)
    for target, row in enumerate(found):
        if row:
            input_ids[target, : len(row[0])] = row[0]
            labels[target, : len(row[1])] = row[1]
    return MicroBatch(input_ids, labels, index)


def rank_micro_batches(
    table: TokenTable, rows: npt.NDArray[np.int64], placement: Placement, rank: int, pad_id: int
) -> Iterator[MicroBatch]:
    """One rank's share of a global batch: micro-batches rank, rank + W, rank + 2 W, …"""
    micro_batches = arrange(table, rows, placement.micro_batch)
    for index in range(rank, len(micro_batches), placement.world_size):
        yield collate(table, micro_batches[index], index, pad_id)


def trained_tokens(table: TokenTable, rows: npt.NDArray[np.int64]) -> int:
    """Trained tokens of a global batch after the shift; every rank computes it alone, so no collective is needed."""
    return sum(table.trained_tokens(int(row)) for row in rows if row != NO_ROW)


def real_tokens(table: TokenTable, rows: npt.NDArray[np.int64]) -> int:
    """Tokens of a global batch without padding."""
    return sum(table.length(int(row)) for row in rows if row != NO_ROW)


def padding_waste(table: TokenTable, seed: int, global_batch: int, micro_batch: int) -> float:
    """Share of the first epoch's positions that are padding: 0.2 means that one in five is computed for nothing."""
    order = epoch_order(len(table), seed, 0)
    positions = tokens = 0
    for step in range(steps_per_epoch(len(table), global_batch)):
        for rows in arrange(table, step_rows(order, step, global_batch), micro_batch):
            lengths = [table.length(int(row)) for row in rows if row != NO_ROW]
            positions += len(rows) * max([SHORTEST, *lengths])
            tokens += sum(lengths)
    return 1 - tokens / positions
