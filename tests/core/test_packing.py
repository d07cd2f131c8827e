"""Best-fit packing: the rows of the textbook, found by the histogram; every sample once, and little room left."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmft_core.data.order import Order
from llmft_core.data.packing import best_fit, deal

LENGTHS = st.lists(st.integers(1, 40), max_size=120)


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as in the textbook: each sample into the fullest row that has room, else into a new one."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def histogram(lengths: list[int]) -> np.ndarray:
    return np.bincount(np.array(lengths, dtype=np.int64))


@given(lengths=LENGTHS, spare=st.integers(0, 60))
def test_rows_are_as_full_as_those_of_the_textbook(lengths: list[int], spare: int) -> None:
    capacity = max([1, *lengths]) + spare
    packed = Counter[int]()
    for kind in best_fit(histogram(lengths), capacity):
        packed[sum(kind.lengths)] += kind.count
    assert packed == Counter(map(sum, one_by_one(lengths, capacity)))


@given(lengths=LENGTHS, spare=st.integers(0, 60), seed=st.integers(0, 3))
def test_every_sample_is_dealt_once_and_no_row_is_too_long(lengths: list[int], spare: int, seed: int) -> None:
    capacity = max([1, *lengths]) + spare
    sizes = np.array(lengths, dtype=np.int32)
    samples, bounds = deal(sizes, capacity, np.random.default_rng(seed))
    assert sorted(samples.tolist()) == list(range(len(lengths)))
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    rows = [sizes[samples[start:end]] for start, end in pairwise(bounds)]
    assert all(0 < row.sum() <= capacity for row in rows)


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3]])
def test_what_fits_no_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot be packed into rows of 8"):
        best_fit(histogram(lengths), 8)


def test_samples_of_one_length_meet_different_ones_in_other_epochs() -> None:
    order = Order(np.full(64, 5, dtype=np.int32), seed=0, capacity=10)
    pairs = []
    for epoch in (order.epoch(0), order.epoch(1)):
        pairs.append({frozenset(pair) for pair in epoch.samples.reshape(-1, 2).tolist()})
    assert len(pairs[0] & pairs[1]) < 8


def test_the_work_depends_on_how_many_lengths_there_are_not_how_many_samples() -> None:
    few = best_fit(np.array([0, *[7] * 512]), 512)
    many = best_fit(np.array([0, *[7 * 1000] * 512]), 512)
    assert len(many) < 2 * len(few)
    assert sum(kind.count for kind in many) > 900 * sum(kind.count for kind in few)


def test_an_epoch_of_many_samples_takes_at_most_32_bytes_each() -> None:
    count = 200_000
    lengths = np.random.default_rng(0).integers(20, 500, count).astype(np.int32)
    for capacity in (0, 512):
        order = Order(lengths, seed=0, capacity=capacity)
        tracemalloc.start()
        epoch = order.epoch(0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(epoch.samples) == count
        assert lengths.nbytes + peak <= 32 * count + 1_000_000, f"{(lengths.nbytes + peak) / count:.1f} bytes"


@pytest.mark.parametrize(("context", "waste"), [(512, 0.03), (2048, 0.012)])
def test_gsm8k_leaves_little_room(gsm8k_folder: Path, llama2_tokenizer_model: Path, context: int, waste: float) -> None:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(llama2_tokenizer_model))
    rows = [json.loads(line) for line in (gsm8k_folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [pieces.encode([row["question"], row["answer"]]) for row in rows]
    all_lengths = np.array([len(question) + len(answer) + 5 for question, answer in texts])  # BOS and four tags
    lengths = all_lengths[all_lengths <= context].astype(np.int32)
    epoch = Order(lengths, seed=0, capacity=context).epoch(0)
    assert len(lengths) > 7_450
    assert 1 - lengths.sum() / (len(epoch) * context) <= waste
