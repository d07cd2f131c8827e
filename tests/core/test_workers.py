"""Encoding in worker processes: the same bytes as in this one, in order, and one line about what goes wrong there."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import TAGS, byte_level_tokenizer

from llmft_core import DatasetFormat, InputError, LlmftError, Problems, SourceOptions
from llmft_core.data.blocks import Block, LinesBlock
from llmft_core.data.encode import EncoderRecipe
from llmft_core.data.encode_blocks import EncodedBlock, Work
from llmft_core.data.prepare import PreparedData, prepare
from llmft_core.data.workers import LocalEngine
from llmft_core.plan import RunPlan

MODULE = """
import os, signal, sys
from llmft_core import Conversation, DatasetFormat, Message, RowProblem, SourceOptions

class Pairs(DatasetFormat):
    name = "pairs"
    summary = "a question and an answer; some rows do what no format should"
    options_type = SourceOptions
    special_tokens = ("<START_Q>", "<END_Q>", "<START_A>", "<END_A>")

    def parse(self, row):
        if "kill" in row:
            os.kill(os.getpid(), signal.SIGKILL)
        if "raise" in row:
            raise KeyError("raise")
        if "modules" in row:
            return RowProblem("modules", " ".join(sorted(sys.modules)))
        if "threads" in row:
            return RowProblem("threads", os.environ["TOKENIZERS_PARALLELISM"])
        if not isinstance(row.get("q"), str):
            return RowProblem("q", "is missing")
        return Conversation((
            Message("user", row["q"], False, "<START_Q>", "<END_Q>"),
            Message("assistant", row["a"], True, "<START_A>", "<END_A>"),
        ))

class NoPickle(Pairs):
    def __init__(self, options):
        super().__init__(options)
        self.lock = __import__("threading").Lock()

class NoSecondLife(Pairs):
    def __setstate__(self, state):
        raise OSError("only once")
"""


@pytest.fixture
def formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stranger's module, which worker processes import as this process does."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "formats_for_workers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield importlib.import_module("formats_for_workers")
    del sys.modules["formats_for_workers"]


@pytest.fixture(scope="module")
def recipe() -> EncoderRecipe:
    return EncoderRecipe.of(byte_level_tokenizer(), "completion", 64, "truncate", TAGS)


def block(first: int, *rows: dict[str, Any]) -> Block:
    return LinesBlock(0, first, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def pair(number: int) -> dict[str, str]:
    return {"q": f"{number}+1", "a": "x" * (1 + number % 50)}


def encode(work: Work, blocks: list[Block], processes: int | None) -> list[EncodedBlock]:
    with LocalEngine(work, processes) as engine:
        return list(engine.encode(iter(blocks), lambda file: f"file{file}"))


def as_bytes(found: EncodedBlock) -> tuple[Any, ...]:
    arrays = (found.ids, found.trained, found.lengths, found.lines, found.parsed_lines, found.hashes)
    return (*[array.tobytes() for array in arrays], found.read, found.problems, found.dropped, found.cut, found.roles)


@pytest.mark.parametrize("processes", [1, 3])
def test_workers_give_what_this_process_gives(formats: Any, recipe: EncoderRecipe, processes: int) -> None:
    blocks = []
    for number in range(0, 900, 30):
        rows = [pair(each) for each in range(number, number + 29)]
        blocks.append(block(number + 1, *rows, {"q": 1} if number % 60 else pair(200)))
    work = Work(formats.Pairs(SourceOptions()), recipe)
    here, there = encode(work, blocks, 0), encode(work, blocks, processes)
    assert sum(len(found.lines) for found in here) == 885
    assert sum(len(found.problems) for found in here) == 15
    assert [as_bytes(found) for found in there] == [as_bytes(found) for found in here]


def test_a_table_is_the_same_for_any_number_of_workers(formats: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rows = [{"q": f"{number} " * 400, "a": "x" * 2000} for number in range(1500)]
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = formats.Pairs(SourceOptions.model_validate({"source": str(source)}))
    tokenizer = byte_level_tokenizer()

    def made(processes: int) -> PreparedData:
        plan = RunPlan.model_validate({"context-length": 5000, "data": {"processes": processes}})
        return prepare(dataset, plan, tokenizer, "print", None, tmp_path / str(processes))

    first, second = made(0), made(3)
    assert len(first.train) == 1500
    assert second.report == first.report
    for path in sorted(first.folder.rglob("*.npy")):
        assert (second.folder / path.relative_to(first.folder)).read_bytes() == path.read_bytes()


def test_small_data_starts_no_process(formats: Any, recipe: EncoderRecipe) -> None:
    (found,) = encode(Work(formats.Pairs(SourceOptions()), recipe), [block(1, {"modules": 1})], None)
    ((_, problem, _),) = found.problems
    assert "pytest" in problem.reason.split()


def test_workers_are_light_and_have_one_thread(formats: Any, recipe: EncoderRecipe) -> None:
    work = Work(formats.Pairs(SourceOptions()), recipe)
    (found,) = encode(work, [block(1, {"modules": 1}, {"threads": 1})], 1)
    (_, modules, _), (_, threads, _) = found.problems
    assert "tokenizers" in modules.reason.split()
    heavy = {"torch", "transformers", "ray", "deepspeed", "accelerate", "pyarrow", "datasets", "rich", "pytest"}
    assert heavy.isdisjoint(modules.reason.split())
    assert threads.reason == "false"


def test_a_killed_worker_is_named_with_its_rows(formats: Any, recipe: EncoderRecipe) -> None:
    blocks = [block(1, pair(1)), block(2, pair(2), {"kill": 1}, pair(3)), block(5, pair(4))]
    with pytest.raises(LlmftError) as caught:
        encode(Work(formats.Pairs(SourceOptions()), recipe), blocks, 2)
    assert str(caught.value) == (
        "file0:2-4: the process that encoded these rows ended (killed by SIGKILL): if memory ran out, take fewer with "
        "--data.processes N; 0 encodes in this process"
    )


@pytest.mark.parametrize("processes", [0, 2])
def test_a_format_that_fails_is_named_with_its_row(formats: Any, recipe: EncoderRecipe, processes: int) -> None:
    blocks = [block(1, pair(1)), block(2, pair(2), {"raise": 1})]
    with pytest.raises(LlmftError) as caught:
        encode(Work(formats.Pairs(SourceOptions()), recipe), blocks, processes)
    assert str(caught.value) == (
        "file0:3: dataset format pairs failed on this row (KeyError: 'raise'): a format returns a RowProblem for a row "
        "it cannot use; tell its author"
    )


def test_a_format_that_cannot_travel(formats: Any, recipe: EncoderRecipe) -> None:
    with pytest.raises(LlmftError, match=r"format pairs cannot be sent to worker processes .*--data.processes 0"):
        encode(Work(formats.NoPickle(SourceOptions()), recipe), [block(1, pair(1))], 1)
    with pytest.raises(LlmftError, match=r"made again in a worker process \(OSError: only once\).*--data.processes 0"):
        encode(Work(formats.NoSecondLife(SourceOptions()), recipe), [block(1, pair(1))], 1)


def test_an_error_of_the_source_ends_the_workers(formats: Any, recipe: EncoderRecipe) -> None:
    def blocks() -> Iterator[Block]:
        yield block(1, pair(1))
        raise InputError("the disk is gone")

    before = children()
    with LocalEngine(Work(formats.Pairs(SourceOptions()), recipe), 2) as engine:
        with pytest.raises(InputError, match="the disk is gone"):
            list(engine.encode(blocks(), str))
        assert children() - before
    assert children() == before


def children() -> set[int]:
    """Processes of this one, by their ids."""
    found = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        found |= {int(number) for number in (task / "children").read_text().split()}
    return found


def test_no_more_blocks_are_read_than_can_be_worked_on(formats: Any, recipe: EncoderRecipe) -> None:
    read = 0

    def blocks() -> Iterator[Block]:
        nonlocal read
        for number in range(40):
            read += 1
            yield block(number + 1, pair(number))

    with LocalEngine(Work(formats.Pairs(SourceOptions()), recipe), 2) as engine:
        ahead = [read - returned for returned, _ in enumerate(engine.encode(blocks(), str))]
    assert read == 40
    assert max(ahead) <= 3 * 2, "two for each worker, and one that waits for it"


def test_problems_come_with_the_bytes_of_the_row(formats: Any, recipe: EncoderRecipe) -> None:
    data = b'{"q": "1", "a": "2"}\n{"q": \xff}\n\n {"a": 3}\n'
    (found,) = encode(Work(formats.Pairs(SourceOptions()), recipe), [LinesBlock(0, 1, data)], 0)
    assert [(line, raw) for line, _, raw in found.problems] == [(2, b'{"q": \xff}'), (4, b' {"a": 3}')]
    assert (found.read, found.lines.tolist()) == (3, [1])


def test_bad_rows_of_workers_are_told_together(formats: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"q": number}) + "\n" for number in range(30)))
    dataset: DatasetFormat = formats.Pairs(SourceOptions.model_validate({"source": str(tmp_path)}))
    with pytest.raises(Problems) as caught:
        prepare(
            dataset, RunPlan.model_validate({"data": {"processes": 1}}), byte_level_tokenizer(), "p", None, tmp_path
        )
    assert "30 of 30 rows cannot be used" in str(caught.value)
    assert str(caught.value.problems[0]) == f"{tmp_path}/train.jsonl:1: q: is missing"
