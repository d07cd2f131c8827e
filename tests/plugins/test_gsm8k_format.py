"""Rows of GSM8K's schema as conversations, and what is said of rows that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmft_core import Conversation, DatasetFormat, InputError, Message, RowProblem
from llmft_core.data.sources import find_sources
from llmft_plugins.datasets.arithmetic import Arithmetic, ArithmeticOptions
from llmft_plugins.datasets.gsm8k import Gsm8k, Gsm8kOptions

FORMATS = [Gsm8k(Gsm8kOptions()), Arithmetic(ArithmeticOptions())]


@pytest.mark.parametrize("dataset", FORMATS, ids=lambda dataset: dataset.name)
def test_a_row_becomes_a_read_question_and_a_learnt_answer(dataset: DatasetFormat) -> None:
    assert dataset.parse({"question": " Q? ", "answer": "A\n#### 1"}) == Conversation(
        (
            Message("user", " Q? ", trained=False, opening="<START_Q>", closing="<END_Q>"),
            Message("assistant", "A\n#### 1", trained=True, opening="<START_A>", closing="<END_A>"),
        )
    )
    assert dataset.keys == ("question", "answer")
    assert dataset.special_tokens == ("<START_Q>", "<END_Q>", "<START_A>", "<END_A>")


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"question": "Q"}, "answer", "is missing; the row has question"),
        ({}, "question", "is missing; the row has no fields"),
        ({"question": None, "answer": "A"}, "question", "is NoneType, not text"),
        ({"question": "Q", "answer": 72}, "answer", "is int, not text"),
        ({"question": ["Q"], "answer": "A"}, "question", "is list, not text"),
        ({"question": "", "answer": "A"}, "question", "is empty"),
        ({"question": "Q", "answer": " \n\t"}, "answer", "is empty"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: dict[str, Any], field: str, reason: str) -> None:
    for dataset in FORMATS:
        problem = dataset.parse(row)
        assert isinstance(problem, RowProblem)
        assert problem.field == field
        assert problem.reason.startswith(reason)


def test_all_of_gsm8k_parses(gsm8k_folder: Path) -> None:
    for split, count in (("train", 7473), ("test", 1319)):
        lines = (gsm8k_folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        parsed = [FORMATS[0].parse(json.loads(line)) for line in lines]
        assert len(parsed) == count
        assert all(isinstance(row, Conversation) for row in parsed)


@pytest.mark.parametrize("config", ["main", "socratic"])
def test_it_knows_where_it_lies_on_the_hub(config: Any) -> None:
    dataset = Gsm8k(Gsm8kOptions(config=config))
    assert dataset.hub_id == "openai/gsm8k"
    assert dataset.hub_files == {
        "train": f"{config}/train-00000-of-00001.parquet",
        "test": f"{config}/test-00000-of-00001.parquet",
    }
    assert dataset.generate("train") is None, "rows are read"


@pytest.mark.parametrize(("config", "suffix"), [("main", ""), ("socratic", "_socratic")])
def test_the_version_is_chosen_in_a_folder_with_both(tmp_path: Path, config: Any, suffix: str) -> None:
    for name in ("train", "test", "train_socratic", "test_socratic"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    sources = find_sources(Gsm8k(Gsm8kOptions(config=config, source=str(tmp_path))), None)
    names = {split: [file.name for file in source.files] for split, source in sources.items()}
    assert names == {split: [f"{tmp_path}/{split}{suffix}.jsonl"] for split in ("train", "test")}


def test_main_rows_are_not_taken_for_socratic_ones(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(
        InputError, match=r"; train\.jsonl is not what gsm8k reads with these options; name a file with"
    ):
        find_sources(Gsm8k(Gsm8kOptions(config="socratic", source=str(tmp_path))), None)
