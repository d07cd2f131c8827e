"""Order and batches: pure functions, each row once an epoch, the same global batches for any world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import random_table

from llmft_core.data.batches import (
    NO_ROW,
    arrange,
    collate,
    epoch_order,
    padding_waste,
    rank_micro_batches,
    real_tokens,
    step_rows,
    steps_per_epoch,
    trained_tokens,
)
from llmft_core.values import Placement


@given(
    rows=st.integers(1, 70),
    world_size=st.integers(1, 4),
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_row_is_consumed_once_an_epoch(
    rows: int, world_size: int, micro_batch: int, accumulation: int, seed: int
) -> None:
    table = random_table(rows, 50, 9, seed)
    placement = Placement(world_size, "cpu", "fp32", micro_batch, accumulation, 1.0)
    order = epoch_order(rows, seed, epoch=3)
    seen: list[int] = []
    for step in range(steps_per_epoch(rows, placement.global_batch)):
        wanted = step_rows(order, step, placement.global_batch)
        cut = arrange(table, wanted, micro_batch)
        seen += [int(row) for row in cut.ravel() if row != NO_ROW]
        indices = []
        tokens = trained = 0
        for rank in range(world_size):
            batches = list(rank_micro_batches(table, wanted, placement, rank, pad_id=0))
            assert len(batches) == accumulation  # every rank takes part in every collective
            for batch in batches:
                assert batch.input_ids.shape == batch.labels.shape
                assert len(batch.input_ids) == micro_batch
                trained += int((batch.labels[:, 1:] != -100).sum())
                indices.append(batch.index)
            tokens += sum(table.length(int(r)) for b in batches for r in cut[b.index] if r != NO_ROW)
        assert sorted(indices) == list(range(world_size * accumulation))
        assert trained == trained_tokens(table, wanted)
        assert tokens == real_tokens(table, wanted)
    assert sorted(seen) == list(range(rows))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    assert (epoch_order(100, 1, 2) == epoch_order(100, 1, 2)).all()
    assert (epoch_order(100, 1, 2) != epoch_order(100, 1, 3)).any()
    assert (epoch_order(100, 1, 2) != epoch_order(100, 2, 2)).any()


def test_rows_of_like_length_are_padded_together_the_longest_first() -> None:
    table = random_table(32, 50, 30)
    cut = arrange(table, np.arange(32), 4)
    longest = [max(table.length(int(row)) for row in rows) for rows in cut]
    assert longest == sorted(longest, reverse=True)


def test_padding_is_masked_and_on_the_right() -> None:
    table = random_table(3, 50, 9)
    batch = collate(table, np.array([0, 1, 2, NO_ROW]), 0, pad_id=7)
    for row in range(3):
        ids, labels = table.row(row)
        assert batch.input_ids[row, : len(ids)].tolist() == ids.tolist()
        assert batch.labels[row, : len(ids)].tolist() == labels.tolist()
        assert set(batch.input_ids[row, len(ids) :]) <= {7}
        assert set(batch.labels[row, len(ids) :]) <= {-100}
    assert set(batch.labels[3]) == {-100}


def test_padding_waste_is_the_share_of_positions_computed_for_nothing() -> None:
    assert padding_waste(random_table(64, 50, 30), 0, 16, 4) < padding_waste(random_table(64, 50, 30), 0, 16, 16)
    table = random_table(8, 50, 9)
    width = max(table.length(row) for row in range(8))
    tokens = sum(table.length(row) for row in range(8))
    assert padding_waste(table, 0, 8, 8) == pytest.approx(1 - tokens / (8 * width))
