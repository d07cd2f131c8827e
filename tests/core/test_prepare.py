"""Token tables: right, cached, all or nothing; and what is said about rows that cannot be used."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_tokenizers import TAGS, byte_level_tokenizer

from llmft_core import (
    Conversation,
    DatasetFormat,
    EncodedExample,
    InputError,
    LlmftError,
    Message,
    Options,
    Origin,
    Problems,
    RowProblem,
    SourceOptions,
    Split,
)
from llmft_core.data import build
from llmft_core.data.build import held_out
from llmft_core.data.encode import Encoder
from llmft_core.data.prepare import PreparedData, TokenTable, prepare
from llmft_core.data.sources import find_sources
from llmft_core.data.tables import TableWriter, write_selection, writing
from llmft_core.plan import RunPlan


class Pairs(DatasetFormat):
    name = "pairs"
    summary = "a question and an answer"
    options_type = SourceOptions
    special_tokens = tuple(TAGS)

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        for field in ("q", "a"):
            if not isinstance(row.get(field), str):
                return RowProblem(field, "is missing or no text")
        return Conversation(
            (
                Message("user", row["q"], False, "<START_Q>", "<END_Q>"),
                Message("assistant", row["a"], True, "<START_A>", "<END_A>"),
            )
        )


class MadePairs(Pairs):
    options_type = Options

    def generate(self, split: Split) -> Iterator[dict[str, Any]] | None:
        return ({"q": f"{number}+1", "a": str(number + 1)} for number in range(20)) if split == "train" else None


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer()


class Bench:
    """A dataset folder and a cache."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.source, self.cache, self.tokenizer = folder / "source", folder / "cache", tokenizer
        self.source.mkdir()

    def write(self, split: str, rows: list[Any]) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.source / f"{split}.jsonl").write_text("\n".join(lines) + "\n" if lines else "", encoding="utf-8")

    def prepare(self, fingerprint: str = "print", dataset: DatasetFormat | None = None, **plan: Any) -> PreparedData:
        options = {name.replace("_", "-"): value for name, value in plan.items()}
        dataset = dataset or Pairs(SourceOptions.model_validate({"source": str(self.source)}))
        valid = RunPlan.model_validate(options)
        sources = find_sources(dataset, None, valid.data.mix)
        return prepare(dataset, sources, valid, self.tokenizer, fingerprint, self.cache)

    def folders(self) -> set[str]:
        data = self.cache / "data"
        return {path.name for path in data.iterdir() if path.is_dir()} if data.exists() else set()


@pytest.fixture
def bench(tmp_path: Path, tokenizer: Any) -> Bench:
    return Bench(tmp_path, tokenizer)


def pairs(count: int, longest: int = 8) -> list[dict[str, str]]:
    return [{"q": f"{number}+1", "a": "x" * (1 + number % longest)} for number in range(count)]


# --- tables -------------------------------------------------------------------------------------------------------

example_rows = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=9
)


def append(writer: TableWriter, example: EncodedExample, line: int, file: int = 0) -> None:
    trained = np.array(example.labels) != -100
    ids = np.array(example.input_ids, dtype=np.int32)
    writer.append_rows(ids, trained, np.array([len(ids)]), np.array([line], dtype=np.int32), np.array([file]))


@given(example_rows)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[list[tuple[int, bool]]]) -> None:
    folder = tmp_path_factory.mktemp("table") / "t"
    with writing(folder) as writer:
        for number, row in enumerate(rows):
            ids = tuple(token for token, _ in row)
            append(writer, EncodedExample(ids, tuple(t if trained else -100 for t, trained in row)), 3 * number + 1)
    table = TokenTable(folder, ["file"])
    assert len(table) == len(rows)
    for number, row in enumerate(rows):
        ids, labels = table.row(number)
        assert ids.dtype == np.int32
        assert labels.dtype == np.int64
        assert ids.tolist() == [token for token, _ in row]
        assert labels.tolist() == [token if trained else -100 for token, trained in row]
        assert table.length(number) == len(row)
        assert table.trained_tokens(number) == sum(trained for _, trained in row[1:])
        assert table.origin(number) == Origin("file", 3 * number + 1)
    assert table.total_tokens == sum(map(len, rows))
    assert table.total_trained_tokens == sum(table.trained_tokens(number) for number in range(len(table)))
    assert table.longest == max(map(len, rows))
    assert table.ends_trained == sum(row[-1][1] for row in rows) / len(rows)


def test_a_table_is_read_only_and_knows_its_end(tmp_path: Path) -> None:
    with writing(tmp_path / "t") as writer:
        append(writer, EncodedExample((1, 2), (-100, 2)), 1)
        assert writer.rows == 1
    table = TokenTable(tmp_path / "t")
    with pytest.raises(ValueError, match="read-only"):
        table.row(0)[0][0] = 7
    for index in (1, -1):
        with pytest.raises(IndexError, match="of a table of 1 rows"):
            table.row(index)


def test_a_selection(tmp_path: Path) -> None:
    with writing(tmp_path / "all") as writer:
        for number in range(5):
            append(writer, EncodedExample((number,) * (number + 1), (number,) * (number + 1)), number + 1)
    write_selection(TokenTable(tmp_path / "all"), np.array([3, 1]), tmp_path / "some")
    some = TokenTable(tmp_path / "some")
    assert [some.row(row)[0].tolist() for row in range(2)] == [[3] * 4, [1] * 2]
    assert some.lines.tolist() == [4, 2]


# --- preparing ----------------------------------------------------------------------------------------------------


def test_rows_become_tables(bench: Bench) -> None:
    bench.write("train", [{"q": "1+1", "a": "two"}, "", {"q": "2+2", "a": "four"}])
    bench.write("test", [{"q": "3+3", "a": "six"}])
    data = bench.prepare()
    assert data.folder == bench.cache / "data" / data.digest
    assert [len(data.train), data.test and len(data.test)] == [2, 1]
    ids, labels = data.train.row(1)
    assert bench.tokenizer.decode(ids) == "<START_Q>2+2<END_Q><START_A>four<END_A>"
    assert bench.tokenizer.decode(labels[labels != -100]) == "four<END_A>"
    assert str(data.train.origin(1)) == f"{bench.source}/train.jsonl:3"
    train = data.report.splits["train"]
    assert (train.rows_read, train.rows, train.dropped, train.cut) == (2, 2, 0, 0)
    assert train.tokens == data.train.total_tokens == data.train.length(0) + data.train.length(1)
    assert train.trained_tokens == data.train.trained_tokens(0) + data.train.trained_tokens(1)
    assert train.ends_trained == 1
    assert train.longest == train.longest_read == max(data.train.length(0), data.train.length(1))


def test_workers_open_the_folder_alone(bench: Bench) -> None:
    bench.write("train", pairs(3))
    data = bench.prepare()
    opened = PreparedData.open(data.folder)
    assert opened.report == data.report
    assert opened.digest == data.digest
    assert opened.test is None
    assert opened.train.origin(2) == data.train.origin(2)
    assert opened.train.row(2)[0].tolist() == data.train.row(2)[0].tolist()


def test_a_second_start_only_hashes(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench.write("train", pairs(30))
    first = bench.prepare(context_length=14, data={"max-dropped": 1})
    assert first.report.splits["train"].dropped_origins

    def never(*args: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Encoder, "encode_batch", never)
    second = bench.prepare(context_length=14, data={"max-dropped": 1})
    assert second.digest == first.digest
    assert second.report == first.report
    # The same bytes elsewhere are the same data, under their new name.
    moved = bench.source.rename(tmp_path / "moved")
    bench.source = moved
    third = bench.prepare(context_length=14, data={"max-dropped": 1})
    assert third.digest == first.digest
    assert third.train.origin(0).source == f"{moved}/train.jsonl"
    assert third.report.splits["train"].dropped_origins[0].startswith(f"{moved}/train.jsonl:")
    with pytest.raises(InputError, match=r"--data\.max-dropped"):  # the limit holds for what is cached, too
        bench.prepare(context_length=14, data={"max-dropped": 0.01})


def test_what_the_key_depends_on(bench: Bench) -> None:
    bench.write("train", pairs(20))
    base = bench.prepare()
    same = [bench.prepare(lr=1.0, seed=3), bench.prepare(data={"max-dropped": 0.5})]
    assert {one.digest for one in same} == {base.digest}
    others = [
        bench.prepare(fingerprint="other"),
        bench.prepare(context_length=100),
        bench.prepare(data={"on-long": "truncate"}),
        bench.prepare(data={"train-on": "all"}),
        bench.prepare(data={"validation-fraction": 0.5}),
        bench.prepare(data={"validation-fraction": 0.5}, seed=3),
    ]
    assert others[1].report.content_digest == base.report.content_digest != others[3].report.content_digest
    bench.write("train", pairs(21))
    others.append(bench.prepare())
    bench.write("test", pairs(1))
    others.append(bench.prepare())
    digests = {base.digest, *(one.digest for one in others)}
    assert len(digests) == 1 + len(others)
    assert bench.folders() == digests


EDITED = """
from llmft_core import Conversation, DatasetFormat, Message, SourceOptions
class Edited(DatasetFormat):
    name, summary, options_type = "edited", "s", SourceOptions
    def parse(self, row):
        return Conversation((Message("assistant", row["a"], True),))
"""


def test_editing_the_format_makes_new_rows(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("train", pairs(3))
    module = tmp_path / "edited_format.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = set()
    for comment in ("# one", "# two"):
        module.write_text(EDITED + comment)
        edited = importlib.import_module("edited_format")
        dataset = edited.Edited(SourceOptions.model_validate({"source": str(bench.source)}))
        digests.add(bench.prepare(dataset=dataset).digest)
    assert len(digests) == 2


def test_generated_rows(bench: Bench) -> None:
    data = bench.prepare(dataset=MadePairs(Options()))
    assert len(data.train) == 20
    assert str(data.train.origin(19)) == "pairs:train:20"
    assert bench.prepare(dataset=MadePairs(Options())).digest == data.digest


def test_a_process_that_is_killed_leaves_no_table(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("train", pairs(3))
    with monkeypatch.context() as patch:
        patch.setattr(build.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bench.prepare()
    assert bench.folders() == set()
    data = bench.prepare()
    # What a killed process could leave under the lock is in nobody's way.
    data.folder.rename(data.folder.with_name(f".{data.digest}.draft"))
    assert bench.prepare().digest == data.digest
    assert bench.folders() == {data.digest}


PREPARE = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from test_prepare import Bench, Pairs, RunPlan, SourceOptions, byte_level_tokenizer, find_sources, prepare
dataset = Pairs(SourceOptions.model_validate({"source": sys.argv[1]}))
data = prepare(dataset, find_sources(dataset, None), RunPlan(), byte_level_tokenizer(), "print", Path(sys.argv[2]))
print(data.digest, len(data.train))
"""


def test_two_processes_at_once(bench: Bench) -> None:
    bench.write("train", pairs(2000))
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    command = [sys.executable, "-c", PREPARE, str(bench.source), str(bench.cache), *paths]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] == f"{bench.prepare().digest} 2000\n"


def test_a_damaged_cache_is_named(bench: Bench) -> None:
    bench.write("train", pairs(3))
    data = bench.prepare()
    (data.folder / "train" / "ids.npy").unlink()
    with pytest.raises(LlmftError, match=r"the token cache .* is damaged .*: remove that folder and start again"):
        bench.prepare()
    with pytest.raises(LlmftError, match="is damaged"):
        PreparedData.open(bench.cache / "nothing")


def test_a_flipped_byte_in_the_cache_is_found_where_it_is_read_again(bench: Bench) -> None:
    bench.write("train", pairs(3))
    path = bench.prepare().folder / "train" / "ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LlmftError, match=r"is damaged \(its tokens are not those that were written\): remove"):
        bench.prepare(data={"rehash": True})


@pytest.mark.parametrize("name", ["ids", "trained", "offsets", "lines", "files"])
def test_an_array_that_is_cut_off_is_found(bench: Bench, name: str) -> None:
    bench.write("train", pairs(3))
    path = bench.prepare().folder / "train" / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LlmftError, match="is damaged"):
        bench.prepare()


def test_a_cache_that_cannot_be_written(bench: Bench) -> None:
    bench.write("train", pairs(3))
    bench.cache.write_text("a file")
    with pytest.raises(LlmftError, match=r"cannot write the token cache .*; set LLMFT_CACHE"):
        bench.prepare()


def test_tables_do_not_travel_as_copies(bench: Bench) -> None:
    bench.write("train", pairs(3))
    data = bench.prepare()
    assert pickle.loads(pickle.dumps(data.report)) == data.report


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


def long_rows(count: int, long: list[int]) -> list[dict[str, str]]:
    return [{"q": "1", "a": "x+" * (100 if number in long else 1)} for number in range(count)]


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


# --- the real thing -----------------------------------------------------------------------------------------------


def test_gsm8k_with_the_llama2_tokenizer(gsm8k_folder: Path, llama2_tokenizer_model: Path, tmp_path: Path) -> None:
    gsm8k = importlib.import_module("llmft_plugins.datasets.gsm8k")
    llama2 = importlib.import_module("llmft_plugins.models.llama2")
    tokenizer = llama2.from_sentencepiece(llama2_tokenizer_model)
    tokenizer.add_tokens(list(gsm8k.Gsm8k.special_tokens), special_tokens=True)
    dataset = gsm8k.Gsm8k(gsm8k.Gsm8kOptions.model_validate({"source": str(gsm8k_folder)}))
    data = prepare(dataset, find_sources(dataset, None), RunPlan(), tokenizer, "print", tmp_path)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (7473 - 9, 1319 - 3)
    splits = data.report.splits
    assert (splits["train"].dropped, splits["test"].dropped) == (9, 3)
    assert splits["train"].ends_trained == splits["test"].ends_trained == 1
    assert 0.6 < splits["train"].trained_tokens / splits["train"].tokens < 0.7
    ids, labels = data.train.row(0)
    assert tokenizer.decode(ids).startswith("<s><START_Q>Natalia sold clips to 48 of her friends in April")
    assert tokenizer.decode(labels[labels != -100]).endswith("\n#### 72<END_A>")
    assert data.train.trained_tokens(0) == np.count_nonzero(labels != -100)
