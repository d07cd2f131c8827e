"""Rows that occur twice, and test rows that are in train: by hashes, in few bytes a row."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmft_core.data.repeats import RowHashes, row_hash
from llmft_core.values import Origin

splits = st.lists(st.lists(st.integers(0, 6), max_size=9), max_size=4)  # files of rows, as hashes


def added(train: list[list[int]], test: list[list[int]]) -> RowHashes:
    hashes = RowHashes()
    for name, files in (("train", train), ("test", test)):
        for number, file in enumerate(files):
            hashes.add("train" if name == "train" else "test", f"{name}{number}", range(1, len(file) + 1), file)
    return hashes


@given(splits, splits)
def test_repeats_are_those_that_a_slow_look_finds(train: list[list[int]], test: list[list[int]]) -> None:
    of_splits, shared = added(train, test).findings()
    places: dict[str, list[tuple[int, Origin]]] = {
        name: [
            (one, Origin(f"{name}{number}", line))
            for number, file in enumerate(files)
            for line, one in enumerate(file, start=1)
        ]
        for name, files in (("train", train), ("test", test))
    }
    for split, rows in places.items():
        first: dict[int, Origin] = {}
        pairs: dict[int, tuple[Origin, Origin]] = {}
        again = 0
        for one, origin in rows:
            if one in first:
                again += 1
                pairs.setdefault(one, (origin, first[one]))
            first.setdefault(one, origin)
        found = of_splits.get("train" if split == "train" else "test", ())
        assert sum(int(finding.text.split()[0]) for finding in found) == again
        assert {pair for finding in found for pair in finding.origins} == set(pairs.values())
    trained = dict(reversed(places["train"]))
    both = [(one, origin) for one, origin in places["test"] if one in trained]
    assert sum(int(finding.text.split()[0]) for finding in shared) == len(both)
    firsts = {one: (origin, trained[one]) for one, origin in reversed(both)}
    assert {pair for finding in shared for pair in finding.origins} == set(firsts.values())


def test_what_is_said_of_repeats() -> None:
    of_splits, shared = added([[1, 2, 1, 1], [2]], [[1, 9]]).findings()
    assert list(map(str, of_splits["train"])) == [
        "3 rows of train repeat another: train0:3 = train0:1, train1:1 = train0:2"
    ]
    assert list(map(str, shared)) == ["1 row of test is in train too: test0:1 = train0:1"]
    assert "test" not in of_splits


def test_twenty_are_named_and_all_are_counted() -> None:
    of_splits, _ = added([list(range(1000)), list(range(1000))], []).findings()
    (finding,) = of_splits["train"]
    assert finding.text == "1000 rows of train repeat another"
    assert [(str(a), str(b)) for a, b in finding.origins] == [(f"train1:{n}", f"train0:{n}") for n in range(1, 21)]


def test_a_million_rows_take_less_than_32_bytes_each() -> None:
    rows, block = 1_000_000, 1000
    generator = np.random.default_rng(0)
    tracemalloc.start()
    hashes = RowHashes()
    for start in range(0, rows, block):
        values = generator.integers(0, rows, block, dtype=np.uint64)  # a third of them repeat another
        hashes.add("train", "f", np.arange(start, start + block, dtype=np.int32), values)
    of_splits, _ = hashes.findings()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert of_splits["train"]
    assert peak / rows < 32


def test_equal_rows_have_one_hash_whatever_their_form() -> None:
    assert row_hash({"a": 1, "b": {"c": "ü", "d": 2}}) == row_hash({"b": {"d": 2, "c": "\u00fc"}, "a": 1})
    assert row_hash({"a": 1}) != row_hash({"a": "1"})
