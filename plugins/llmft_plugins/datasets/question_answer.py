"""Rows of GSM8K's schema, `{"question": …, "answer": …}`: shared by the two formats that ship with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmft_core import Conversation, DatasetFormat, Message, Role, RowProblem
from llmft_plugins.datasets.fields import missing_field, wrong_text

FIELDS = ("question", "answer")
USER = Role("user", "<START_Q>", "<END_Q>", served_as="user")
ASSISTANT = Role("assistant", "<START_A>", "<END_A>", trained=True, served_as="assistant")


class QuestionAnswer(DatasetFormat):
    """A question that is read and an answer that is learnt, each between two special tokens."""

    special_tokens = ("<START_Q>", "<END_Q>", "<START_A>", "<END_A>")
    roles = (USER, ASSISTANT)
    keys: ClassVar[tuple[str, ...]] = FIELDS

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        if problem := missing_field(row, FIELDS):
            return problem
        for field in FIELDS:
            if problem := wrong_text(row[field], field):
                return problem
        return Conversation(
            tuple(
                Message(role.name, row[field], role.trained, role.opening, role.closing)
                for role, field in zip(self.roles, FIELDS, strict=True)
            )
        )
