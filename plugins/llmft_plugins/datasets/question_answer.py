"""Rows of GSM8K's schema, `{"question": …, "answer": …}`: shared by the two formats that ship with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmft_core import Conversation, DatasetFormat, Message, RowProblem

FIELDS = ("question", "answer")


class QuestionAnswer(DatasetFormat):
    """A question that is read and an answer that is learnt, each between two special tokens."""

    special_tokens: ClassVar[tuple[str, ...]] = ("<START_Q>", "<END_Q>", "<START_A>", "<END_A>")

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        for field in FIELDS:
            if field not in row:
                return RowProblem(field, f"is missing; the row has {', '.join(map(str, row)) or 'no fields'}")
            if not isinstance(row[field], str):
                return RowProblem(field, f"is {type(row[field]).__name__}, not text")
            if not row[field].strip():
                return RowProblem(field, "is empty")
        unknown = [str(key) for key in row if key not in FIELDS]
        if unknown:
            return RowProblem(unknown[0], f"is unknown; a row has {' and '.join(FIELDS)}, nothing else")
        return Conversation(
            (
                Message("user", row["question"], trained=False, opening="<START_Q>", closing="<END_Q>"),
                Message("assistant", row["answer"], trained=True, opening="<START_A>", closing="<END_A>"),
            )
        )
