"""Batches: pure functions, each sample once an epoch, the same global batches for any world size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import ListTable, random_table

from llmft_core.data.batches import (
    Form,
    MicroBatch,
    arrange,
    collate,
    padding_waste,
    rank_micro_batches,
    real_tokens,
    steps_of,
    trained_tokens,
)
from llmft_core.data.order import Order, Rows
from llmft_core.plan import RunPlan
from llmft_core.values import Placement

PAD = 0  # random tables have no token of this id
LONGEST = 9


def samples_of(batch: MicroBatch) -> list[tuple[int, ...]]:
    """The token ids of each sample of a packed micro-batch, cut at the positions that are 0."""
    assert batch.position_ids is not None
    found = []
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        starts = [*np.flatnonzero(positions == 0), len(ids)]
        found += [tuple(ids[start:end].tolist()) for start, end in pairwise(starts)]
    return [sample for sample in found if set(sample) != {PAD}]


def rows_of(*rows: list[int]) -> Rows:
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return Rows(np.array([sample for row in rows for sample in row], dtype=np.int32), bounds)


def all_ranks(
    table: ListTable, order: Order, placement: Placement, first: int, form: Form
) -> list[list[list[MicroBatch]]]:
    """From optimizer step `first` to the end of epoch 3: step → rank → micro-batches."""
    epoch = order.epoch(3)
    steps = steps_of(len(epoch), placement.global_batch, drop_last=False)
    return [
        [list(rank_micro_batches(table, epoch.step(step, placement.global_batch), placement, rank, form)) for rank in
         range(placement.world_size)]
        for step in range(first, steps)
    ]  # fmt: skip


def as_bytes(batch: MicroBatch) -> bytes:
    return batch.input_ids.tobytes() + batch.labels.tobytes()


@given(
    rows=st.integers(1, 70),
    world_size=st.integers(1, 4),
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
    capacity=st.sampled_from([0, LONGEST, 25]),
    data=st.data(),
)
def test_every_sample_is_consumed_once_an_epoch_from_wherever_it_is_resumed(
    rows: int, world_size: int, micro_batch: int, accumulation: int, seed: int, capacity: int, data: Any
) -> None:
    table = random_table(rows, 50, LONGEST, seed)
    placement = Placement(world_size, "cpu", "fp32", micro_batch, accumulation, 1.0)
    form = Form(PAD, packed=True)  # positions, by which samples are told apart, whether there is one in a row or more
    whole = all_ranks(table, Order(table.lengths, seed, capacity), placement, 0, form)
    seen = []
    for ranks in whole:
        assert [len(batches) for batches in ranks] == [accumulation] * world_size  # all take part in each collective
        in_step = [batch for batches in ranks for batch in batches]
        assert sorted(batch.index for batch in in_step) == list(range(world_size * accumulation))
        assert {len(batch.input_ids) for batch in in_step} == {micro_batch}
        assert all(batch.input_ids.shape[1] <= max(capacity, LONGEST) for batch in in_step)
        seen += [sample for batch in in_step for sample in samples_of(batch)]
    assert sorted(seen) == sorted(tuple(table.row(row)[0].tolist()) for row in range(rows))
    first = data.draw(st.integers(0, len(whole)))
    again = all_ranks(table, Order(table.lengths, seed, capacity), placement, first, form)
    assert [[list(map(as_bytes, batches)) for batches in ranks] for ranks in again] == [
        [list(map(as_bytes, batches)) for batches in ranks] for ranks in whole[first:]
    ]


@given(
    rows=st.integers(1, 70),
    layout=st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]),
    micro_batch=st.sampled_from([1, 2, 3]),
    capacity=st.sampled_from([0, 25]),
)
def test_global_batches_are_the_same_for_any_world_size(
    rows: int, layout: tuple[int, int], micro_batch: int, capacity: int
) -> None:
    table, form = random_table(rows, 50, LONGEST), Form(PAD, packed=bool(capacity))
    world_size, accumulation = layout
    alone = Placement(1, "cpu", "fp32", micro_batch, 12, 1.0)
    together = Placement(world_size, "cpu", "fp32", micro_batch, accumulation, 1.0)
    order = Order(table.lengths, seed=0, capacity=capacity)
    for expected, ranks in zip(
        all_ranks(table, order, alone, 0, form), all_ranks(table, order, together, 0, form), strict=True
    ):
        found = sorted((batch for batches in ranks for batch in batches), key=lambda batch: batch.index)
        assert list(map(as_bytes, found)) == list(map(as_bytes, expected[0]))


@given(rows=st.integers(1, 40), global_batch=st.integers(1, 12), capacity=st.sampled_from([0, 25]))
def test_tokens_of_a_step_are_counted_as_they_are_in_the_batches(rows: int, global_batch: int, capacity: int) -> None:
    table = random_table(rows, 50, LONGEST)
    epoch = Order(table.lengths, 0, capacity).epoch(0)
    for step in range(steps_of(len(epoch), global_batch, drop_last=False)):
        in_step = epoch.step(step, global_batch)
        assert len(in_step) == global_batch
        batch = collate(table, in_step, np.arange(global_batch), 0, Form(PAD, packed=bool(capacity)))
        assert int((batch.labels[:, 1:] != -100).sum()) == trained_tokens(table, in_step)
        assert int((batch.input_ids != PAD).sum()) == real_tokens(table, in_step)


def test_rows_of_like_length_are_padded_together_the_longest_first() -> None:
    table = random_table(32, 50, 30)
    rows = rows_of(*np.arange(32).reshape(16, 2).tolist())
    cut = arrange(table, rows, 4)
    assert sorted(cut.ravel().tolist()) == list(range(16))
    longest = [max(table.length(2 * number) + table.length(2 * number + 1) for number in numbers) for numbers in cut]
    assert longest == sorted(longest, reverse=True)


def test_padding_is_masked_and_on_the_right() -> None:
    table = random_table(3, 50, LONGEST)
    batch = collate(table, rows_of([0], [1], [2], []), np.arange(4), 0, Form(7, packed=False))
    assert batch.position_ids is None
    for row in range(3):
        ids, labels = table.row(row)
        assert batch.input_ids[row, : len(ids)].tolist() == ids.tolist()
        assert batch.labels[row, : len(ids)].tolist() == labels.tolist()
        assert set(batch.input_ids[row, len(ids) :]) <= {7}
        assert set(batch.labels[row, len(ids) :]) <= {-100}
    assert set(batch.labels[3]) == {-100}


def test_a_packed_row_restarts_its_positions_and_predicts_no_first_token() -> None:
    table = ListTable([([5, 6, 7], [5, 6, 7]), ([8, 9], [-100, 9]), ([4, 3, 2, 1], [4, 3, 2, 1])])
    batch = collate(table, rows_of([1], [2, 0]), np.array([1, 0]), 3, Form(PAD, packed=True))
    assert batch.position_ids is not None
    assert batch.input_ids.tolist() == [[4, 3, 2, 1, 5, 6, 7], [8, 9, PAD, PAD, PAD, PAD, PAD]]
    assert batch.labels.tolist() == [[-100, 3, 2, 1, -100, 6, 7], [-100, 9, *[-100] * 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]
    assert batch.index == 3


def test_rows_are_padded_to_the_context_where_that_is_wanted() -> None:
    table, rows = random_table(1, 50, LONGEST), rows_of([0])
    for packing in ("none", "best-fit"):
        plan = {"context-length": 64, "data": {"packing": packing, "pad-to-context": True}}
        batch = collate(table, rows, np.array([0]), 0, Form.of(RunPlan.from_json(plan), PAD))
        assert batch.input_ids.shape == (1, 64)
        plan["data"]["pad-to-context"] = False
        batch = collate(table, rows, np.array([0]), 0, Form.of(RunPlan.from_json(plan), PAD))
        assert batch.input_ids.shape == (1, table.length(0))


@given(rows=st.integers(1, 40), micro_batch=st.integers(1, 3), capacity=st.sampled_from([0, 25]), wide=st.booleans())
def test_padding_waste_is_the_share_of_positions_computed_for_nothing(
    rows: int, micro_batch: int, capacity: int, wide: bool
) -> None:
    table = random_table(rows, 50, LONGEST)
    epoch = Order(table.lengths, 0, capacity).epoch(0)
    form = Form(PAD, packed=True, width=30 if wide else 2)
    global_batch = 4 * micro_batch
    batches = [
        collate(table, rows, numbers, 0, form)
        for rows in [epoch.step(k, global_batch) for k in range(steps_of(len(epoch), global_batch, drop_last=False))]
        for numbers in arrange(table, rows, micro_batch)
    ]
    positions = sum(batch.input_ids.size for batch in batches)
    tokens = sum(int((batch.input_ids != PAD).sum()) for batch in batches)
    found = padding_waste(epoch.lengths(table.lengths), global_batch, micro_batch, form.width)
    assert found == pytest.approx(1 - tokens / positions)


def test_the_length_of_a_row_is_that_of_its_samples_together() -> None:
    assert rows_of([2, 0], [], [1]).lengths(np.array([3, 5, 7], dtype=np.int32)).tolist() == [10, 0, 5]
