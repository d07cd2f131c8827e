"""What is said and done about rows that cannot be used, and which rows are held out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import Bench, Pairs, long_rows, pairs
from hypothesis import given
from hypothesis import strategies as st

from llmft_core import (
    Conversation,
    InputError,
    LlmftError,
    Problems,
    RowProblem,
    SourceOptions,
)
from llmft_core.data.build import held_out
from llmft_core.data.prepare import PreparedData


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# --- rows that cannot be used -------------------------------------------------------------------------------------


def test_all_problems_of_all_splits_together(bench: Bench) -> None:
    bench.write("train", [*pairs(2), '{"q": "no end', {"q": "1"}, {"q": "1", "a": "2"}, "[1]"])
    bench.write("test", [{"a": 3}])
    with pytest.raises(Problems) as caught:
        bench.prepare()
    train, test = f"{bench.source}/train.jsonl", f"{bench.source}/test.jsonl"
    (quarantine,) = (bench.cache / "quarantine").iterdir()
    assert str(caught.value).split("\n") == [
        "4 of 7 rows cannot be used; mend or remove them, or set them aside with --data.on-bad-row quarantine:",
        f"{train}:3: is not valid JSON: this string has no closing quote (column 7)",
        f"{train}:4: a: is missing or no text",
        f"{train}:6: is a JSON array, not an object ({{…}})",
        f"{test}:1: q: is missing or no text",
        "1 row: is not valid JSON",
        "1 row: a: is missing or no text",
        "1 row: is a JSON array, not an object ({…})",
        "1 row: q: is missing or no text",
        f"all of them, as they lie in their files: {quarantine}",
    ]
    assert bench.folders() == set()


def test_the_first_twenty_then_counts(bench: Bench) -> None:
    bench.write("train", [{"q": "1"} if number % 2 else {"a": "1"} for number in range(61)])
    with pytest.raises(Problems) as caught:
        bench.prepare()
    lines = str(caught.value).split("\n")
    assert lines[0] == (
        "61 of 61 rows cannot be used; mend or remove them, or set them aside with --data.on-bad-row quarantine (the "
        "first 20, then counts by reason):"
    )
    assert len(lines) == 1 + 20 + 2 + 1
    assert lines[-3:-1] == ["31 rows: q: is missing or no text", "30 rows: a: is missing or no text"]


def test_one_reason_counts_once_whatever_its_numbers(bench: Bench) -> None:
    bench.write("train", long_rows(9, [1, 3, 5]))
    with pytest.raises(Problems) as caught:
        bench.prepare(context_length=20, data={"on-long": "error"})
    assert [problem.reason for problem in caught.value.problems[3:-1]] == ["3 rows: is longer than --context-length 20"]


def test_many_different_reasons_stay_a_short_list(bench: Bench) -> None:
    bench.write("train", [f'{{"field{number}": "\\ud800"}}' for number in range(100)])
    with pytest.raises(Problems) as caught:
        bench.prepare()
    lines = str(caught.value).split("\n")
    assert len(lines) == 1 + 20 + 20 + 1 + 1
    assert lines[-2] == "80 rows: other reasons"


def test_a_role_that_does_not_exist_is_said_before_the_rows(bench: Bench) -> None:
    bench.write("train", pairs(5))
    with pytest.raises(InputError, match=r"--data.train-on: no row has the role bot; there are assistant, user"):
        bench.prepare(data={"train-on": "bot"})
    assert bench.prepare(data={"train-on": "user"}).report.splits["train"].ends_trained == 0


def test_a_format_that_fails_is_named_with_the_row(bench: Bench) -> None:
    class Careless(Pairs):
        def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
            raise KeyError("q")

    bench.write("train", ["", *pairs(1)])
    with pytest.raises(LlmftError, match=r"train.jsonl:2: dataset format pairs failed on this row \(KeyError: 'q'\)"):
        bench.prepare(dataset=Careless(SourceOptions.model_validate({"source": str(bench.source)})))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split(bench: Bench, split: str) -> None:
    bench.write("train", pairs(3))
    bench.write(split, [""])
    with pytest.raises(InputError, match=rf"^--dataset.source: .*/{split}.jsonl has no rows; a {split} split needs"):
        bench.prepare()


# --- long rows ----------------------------------------------------------------------------------------------------


def test_dropped_rows_are_counted_and_named(bench: Bench) -> None:
    bench.write("train", long_rows(100, [6, 41]))
    data = bench.prepare(context_length=20)
    train = data.report.splits["train"]
    assert (train.rows_read, train.rows, train.dropped, train.cut) == (100, 98, 2, 0)
    assert train.dropped_origins == (f"{bench.source}/train.jsonl:7", f"{bench.source}/train.jsonl:42")
    assert train.longest <= 20 < train.longest_read
    assert 7 not in data.train.lines
    assert data.train.lines.tolist() == [line for line in range(1, 101) if line not in (7, 42)]


def test_cut_rows_are_counted_and_end_trained(bench: Bench) -> None:
    bench.write("train", long_rows(100, [6, 41]))
    data = bench.prepare(context_length=20, data={"on-long": "truncate"})
    train = data.report.splits["train"]
    assert (train.rows_read, train.rows, train.dropped, train.cut) == (100, 100, 0, 2)
    assert train.cut_origins == (f"{bench.source}/train.jsonl:7", f"{bench.source}/train.jsonl:42")
    assert data.train.length(6) == 20
    assert train.ends_trained == 1


def test_too_many_long_rows(bench: Bench) -> None:
    bench.write("train", long_rows(10, [1]))
    with pytest.raises(
        InputError,
        match=r"^1 of 10 train rows \(10.0%\) are longer than --context-length 20 and would be dropped; "
        r"--data.max-dropped 0.05 allows 5.0%: raise --context-length \(the longest row has \d+ tokens\), or choose "
        r"another --data.on-long or --data.max-dropped$",
    ):
        bench.prepare(context_length=20)
    with pytest.raises(InputError, match="would be dropped or cut"):
        bench.prepare(context_length=20, data={"on-long": "truncate"})
    with pytest.raises(InputError, match=r"10 of 10 train rows .* none would be left"):
        bench.prepare(context_length=3, data={"max-dropped": 1})
    with pytest.raises(Problems, match=r"train.jsonl:2: is longer than --context-length 20: \d+ tokens"):
        bench.prepare(context_length=20, data={"on-long": "error"})
    assert len(bench.prepare(context_length=20, data={"max-dropped": 0.1}).train) == 9


# --- held out -----------------------------------------------------------------------------------------------------


@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(0, 5))
def test_held_out_counts_are_exact(rows: int, fraction: float, seed: int) -> None:
    count = round(fraction * rows)
    lines = np.arange(1, rows + 1)
    if 0 < count < rows:
        held = held_out(lines, fraction, seed).tolist()
        assert len(set(held)) == count
        assert held == held_out(lines, fraction, seed).tolist()
    else:
        with pytest.raises(InputError, match=f"--data.validation-fraction .* of {rows} rows is {count} rows"):
            held_out(lines, fraction, seed)


def test_a_row_stays_on_its_side() -> None:
    lines = np.arange(1, 1001)
    held = set(lines[held_out(lines, 0.1, 0)].tolist())
    without = lines[lines % 50 != 0]
    again = set(without[held_out(without, 0.1, 0)].tolist())
    assert len(again - held) <= 2 + len([line for line in held if line % 50 == 0])
    assert held != set(lines[held_out(lines, 0.1, 1)].tolist())


def test_validation_rows_are_taken_from_the_training_rows(bench: Bench) -> None:
    bench.write("train", long_rows(100, [6, 41]))
    data = bench.prepare(context_length=20, data={"validation-fraction": 0.1})
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (88, 10)
    both = sorted([*data.train.lines.tolist(), *data.test.lines.tolist()])
    assert both == [line for line in range(1, 101) if line not in (7, 42)]
    assert str(data.test.origin(0)) == f"{bench.source}/train.jsonl:{data.test.lines[0]}"
    train, test = data.report.splits["train"], data.report.splits["test"]
    assert (train.rows_read, train.rows, train.dropped) == (90, 88, 2)
    assert (test.rows_read, test.rows, test.dropped) == (10, 10, 0)
    assert sorted(path.name for path in data.folder.iterdir()) == ["report.json", "test", "train"]
    assert PreparedData.open(data.folder).report == data.report
    assert bench.prepare(context_length=20, data={"validation-fraction": 0.1}).report == data.report
    # The share that is allowed is one of all rows read, however few of them are held out.
    cut = bench.prepare(context_length=20, data={"validation-fraction": 0.03, "on-long": "truncate"}, seed=1)
    assert sum(one.cut for one in cut.report.splits.values()) == 2


def test_validation_fraction_beside_test_rows(bench: Bench) -> None:
    bench.write("train", pairs(10))
    bench.write("test", pairs(2))
    with pytest.raises(InputError, match=r"^--data.validation-fraction 0.1: there are test rows already .*test.jsonl"):
        bench.prepare(data={"validation-fraction": 0.1})
