"""Chats as lists of messages: what is read, and what is said of one that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from llmft_core import Conversation, Message, RowProblem, SourceOptions
from llmft_plugins.datasets.messages import Messages

DATASET = Messages(SourceOptions())
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How many?"}
ASSISTANT = {"role": "assistant", "content": " 72\n"}


def test_all_answers_are_trained() -> None:
    assert DATASET.parse({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}) == Conversation(
        (
            Message("system", "Be brief.", trained=False),
            Message("user", "How many?", trained=False),
            Message("assistant", " 72\n", trained=True),
            Message("user", "How many?", trained=False),
            Message("assistant", " 72\n", trained=True),
        ),
        template=True,
    )


@pytest.mark.parametrize(("weight", "trained"), [(0, False), (1, True), (None, True)])
def test_a_weight_of_zero_leaves_an_answer_out(weight: int | None, trained: bool) -> None:
    conversation = DATASET.parse({"messages": [USER, {**ASSISTANT, "weight": weight}, USER, ASSISTANT]})
    assert isinstance(conversation, Conversation)
    assert [message.trained for message in conversation.messages] == [False, trained, False, True]


@pytest.mark.parametrize(
    ("messages", "field", "reason"),
    [
        (None, "messages", "is NoneType, not a list of messages"),
        ("x", "messages", "is str, not a list of messages"),
        ([], "messages", "is empty"),
        ([USER], "messages", "ends with a message of the user, which nothing answers"),
        ([USER, "x"], "messages[1]", "is str, not an object with role and content"),
        ([{"content": "x"}, ASSISTANT], "messages[0].role", "is missing; there are system, user, assistant"),
        ([{"role": "human", "content": "x"}], "messages[0].role", "is human; there are system, user, assistant"),
        ([{"role": None, "content": "x"}], "messages[0].role", "is None; there are system, user, assistant"),
        ([{"role": "user"}], "messages[0].content", "is missing"),
        ([{"role": "user", "content": None}], "messages[0].content", "is NoneType, not text"),
        ([{"role": "user", "content": " "}], "messages[0].content", "is empty"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "messages[0].content",
            "is a list of parts: only messages of text are trained; join the parts to one text",
        ),
        (
            [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
            "messages[1]",
            "is a call of a tool or its result: only messages of text are trained; remove such rows",
        ),
        (
            [USER, {"role": "tool", "content": "72"}, ASSISTANT],
            "messages[1]",
            "is a call of a tool or its result: only messages of text are trained; remove such rows",
        ),
        (
            [{**USER, "name": "Ann"}, ASSISTANT],
            "messages[0].name",
            "is unknown; a message has role, content, weight",
        ),
        (
            [USER, {**ASSISTANT, "weight": 0.5}],
            "messages[1].weight",
            "is 0.5; it is 1 (trained) or 0 (not trained)",
        ),
    ],
)
def test_a_chat_that_cannot_be_used_says_why(messages: Any, field: str, reason: str) -> None:
    assert DATASET.parse({"messages": messages}) == RowProblem(field, reason)


def test_other_fields_of_a_row() -> None:
    row = {"messages": [USER, ASSISTANT]}
    tools = RowProblem("tools", "is of no use here: only messages of text are trained; remove it")
    assert DATASET.parse({**row, "tools": [{"type": "function"}]}) == tools
    assert isinstance(DATASET.parse({**row, "tools": None, "functions": []}), Conversation)
    assert DATASET.keys == ("messages", "tools", "functions")
    assert DATASET.parse({"conversation": []}) == RowProblem("messages", "is missing; the row has conversation")
