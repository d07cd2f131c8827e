"""The order of epochs: seed and epoch alone decide it; a mix of sources; how many optimizer steps there are."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmft_core.data.order import Mix, Order, epoch_rows
from llmft_core.data.steps import epoch_steps, first_epoch, total_steps
from llmft_core.errors import InputError
from llmft_core.plan import RunPlan
from llmft_core.train.job import Job
from llmft_core.values import Placement

ONES = np.ones(100, dtype=np.int32)
WEIGHTS = st.fractions(min_value=Fraction(1, 20), max_value=3, max_denominator=20)


@pytest.mark.parametrize("capacity", [0, 10])
def test_the_order_depends_on_seed_and_epoch_only(capacity: int) -> None:
    def samples(seed: int, epoch: int) -> list[int]:
        return Order(ONES, seed, capacity).epoch(epoch).samples.tolist()

    assert samples(1, 2) == samples(1, 2)
    assert samples(1, 2) != samples(1, 3)
    assert samples(1, 2) != samples(2, 2)


def test_the_order_of_published_runs_stays() -> None:
    expected = np.random.default_rng([7, 3]).permutation(100)
    assert Order(ONES, seed=7, capacity=0).epoch(3).samples.tolist() == expected.tolist()


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    weights=st.lists(WEIGHTS, min_size=3, max_size=3),
    seed=st.integers(0, 3),
)
def test_each_row_of_a_source_is_seen_as_often_as_its_weight_says(
    sizes: list[int], weights: list[Fraction], seed: int
) -> None:
    sources = np.repeat(np.arange(len(sizes)), sizes)
    weights = weights[: len(sizes)]
    counts = np.zeros(len(sources), dtype=int)
    epochs = 20  # of which the weights with a denominator that divides it make whole rounds
    for epoch in range(epochs):
        rows = epoch_rows(sources, list(map(float, weights)), seed, epoch)
        counts += np.bincount(rows, minlength=len(sources))
        for source, weight in enumerate(weights):
            mine = counts[sources == source]
            if len(mine):
                assert mine.max() - mine.min() <= 1  # nobody is ahead of another by more than one
                passes, part = divmod(weight, 1)
                assert mine.sum() == (epoch + 1) * passes * len(mine) + int((epoch + 1) * part * len(mine))
    for source, weight in enumerate(weights):
        if epochs % weight.denominator == 0:
            assert set(counts[sources == source].tolist()) <= {int(epochs * weight)}


def test_half_of_a_source_is_followed_by_its_other_half() -> None:
    sources = np.repeat([0, 1], [10, 4])
    first, second = (epoch_rows(sources, [0.5, 2], seed=0, epoch=epoch) for epoch in (0, 1))
    assert sorted([*first[first < 10], *second[second < 10]]) == list(range(10))
    assert sorted(first[first >= 10].tolist()) == [10, 10, 11, 11, 12, 12, 13, 13]
    third = epoch_rows(sources, [0.5, 2], seed=0, epoch=2)
    assert set(third[third < 10]) != set(first[first < 10]), "shuffled anew for the next round"


@given(capacity=st.sampled_from([0, 12]), epoch=st.integers(0, 4))
def test_a_mixed_epoch_has_the_rows_that_the_mix_says(capacity: int, epoch: int) -> None:
    lengths = np.arange(1, 13, dtype=np.int32)
    mix = Mix(np.repeat([0, 1], 6), (1.5, 0.5))
    order = Order(lengths, 0, capacity, mix)
    found = order.epoch(epoch)
    assert sorted(found.samples.tolist()) == sorted(epoch_rows(mix.source_of_row, mix.weights, 0, epoch).tolist())
    assert len(found) == order.rows(epoch)
    assert not order.always_alike
    assert Order(lengths, 0, capacity, Mix(mix.source_of_row, (2.0, 1.0))).always_alike


def placed(**settings: Any) -> tuple[RunPlan, Placement]:
    plan = RunPlan.from_json({"epochs": 1, "global-batch": 8, **settings})
    return plan, Placement(2, "cpu", "fp32", 2, plan.global_batch // 4, 1.0)


@pytest.mark.parametrize(
    ("settings", "steps", "total"),
    [
        ({}, (13,), 13),
        ({"epochs": 3}, (13, 13, 13), 39),
        ({"epochs": 3, "data": {"drop-last": True}}, (12, 12, 12), 36),
        ({"epochs": None, "max-steps": 20}, (13, 13), 20),
        ({"epochs": 3, "max-steps": 26}, (13, 13), 26),
        ({"epochs": 3, "smoke-test": True}, (13,), 1),
        ({"context-length": 4, "data": {"packing": "best-fit"}}, (4,), 4),
    ],
)
def test_steps_are_counted_before_anything_starts(settings: dict, steps: tuple[int, ...], total: int) -> None:
    plan, placement = placed(**settings)
    found = epoch_steps(Order.of(Table(ONES), plan), plan, placement, None)
    assert found == steps
    assert total_steps(plan, found) == total


class Table:
    """What an order takes of a table."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths


def test_epochs_of_a_mix_may_differ_in_their_steps() -> None:
    plan, placement = placed(epochs=4)
    order = Order(ONES, 0, 0, Mix(np.zeros(100, dtype=int), (0.25 + 0.0625,)))
    rows = [len(order.epoch(epoch)) for epoch in range(4)]
    assert rows == [31, 31, 31, 32]
    steps = epoch_steps(order, plan, placement, None)
    assert steps == (4, 4, 4, 4)
    job = Job(plan, placement, 14, (4, 3, 5, 4), 10, 0, (), {}, Path(), Path(), Path())
    assert [job.locate(step) for step in (0, 3, 4, 6, 7, 11, 12, 13)] == [
        (0, 0), (0, 3), (1, 0), (1, 2), (2, 0), (2, 4), (3, 0), (3, 1),
    ]  # fmt: skip
    assert job.epochs == 3.5
    assert Job.from_json(job.to_json()) == job


@pytest.mark.parametrize(
    ("rows", "settings", "micro_batch", "message"),
    [
        (7, {}, None, "8 rows, more than the 7 there are: give at least 8, or use --global-batch 6"),
        (7, {}, 3, "8 rows, more than the 7 there are: give at least 8, or use --global-batch 6"),
        (3, {}, 2, "8 rows, more than the 3 there are: give at least 8, or use --global-batch 2 --micro-batch 1"),
        (1, {}, None, "8 rows, more than the 1 there are: give at least 8, or use --global-batch 1 --workers 1"),
        (20, {"context-length": 4, "data": {"packing": "best-fit"}}, None,
            "8 packed rows, more than the 5 of 4 tokens that 20 make: give about 32 rows or more, "
            "or use --global-batch 4"),
    ],
)  # fmt: skip
def test_too_few_rows_for_one_step_say_what_would_do(
    rows: int, settings: dict, micro_batch: int | None, message: str
) -> None:
    plan, placement = placed(**settings)
    with pytest.raises(InputError) as caught:
        epoch_steps(Order.of(Table(ONES[:rows]), plan), plan, placement, micro_batch)
    assert str(caught.value) == f"one optimizer step takes {message}"


def test_a_mix_that_leaves_an_epoch_without_rows_is_refused() -> None:
    plan, placement = placed()
    with pytest.raises(InputError, match=r"the 0 there are in epoch 1 of the mix: raise the weights of --data\.mix$"):
        epoch_steps(Order(ONES[:1], 0, 0, Mix(np.zeros(1, dtype=int), (0.5,))), plan, placement, None)


def test_what_is_left_out_and_what_packing_would_do_are_known() -> None:
    plan, placement = placed(**{"context-length": 4, "data": {"drop-last": True}})
    found = first_epoch(Order.of(Table(ONES), plan), plan, placement)
    assert (found.samples, found.tokens, found.rows, found.left_out) == (100, 100, 100, 4)
    assert found.padding == pytest.approx(0.5)  # a micro-batch is two positions wide at least
    assert (found.packed_rows, found.packed_padding) == (25, 0)
