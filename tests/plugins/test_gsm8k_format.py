"""Rows of GSM8K's schema as conversations, and what is said of rows that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmft_core import Conversation, DatasetFormat, Message, RowProblem, SourceOptions
from llmft_plugins.datasets.arithmetic import Arithmetic, ArithmeticOptions
from llmft_plugins.datasets.gsm8k import Gsm8k

FORMATS = [Gsm8k(SourceOptions()), Arithmetic(ArithmeticOptions())]


@pytest.mark.parametrize("dataset", FORMATS, ids=lambda dataset: dataset.name)
def test_a_row_becomes_a_read_question_and_a_learnt_answer(dataset: DatasetFormat) -> None:
    assert dataset.parse({"question": " Q? ", "answer": "A\n#### 1"}) == Conversation(
        (
            Message("user", " Q? ", trained=False, opening="<START_Q>", closing="<END_Q>"),
            Message("assistant", "A\n#### 1", trained=True, opening="<START_A>", closing="<END_A>"),
        )
    )
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
        ({"question": "Q", "answer": "A", "anwser": "A"}, "anwser", "is unknown; a row has question and answer"),
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


def test_it_knows_where_it_lies_on_the_hub() -> None:
    assert Gsm8k.hub_id == "openai/gsm8k"
    assert set(Gsm8k.hub_files) == {"train", "test"}
    assert FORMATS[0].generate("train") is None, "rows are read"
