"""The chat template says what the encoder does."""

from __future__ import annotations

import jinja2
import pytest

from llmft_core.data.chat import chat_template
from llmft_core.values import Conversation, Message


def render(template: str, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    def raise_exception(text: str) -> None:
        raise ValueError(text)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(messages=messages, bos_token="<s>", add_generation_prompt=prompt)


QUESTION = Message("user", "q", trained=False, opening="<START_Q>", closing="<END_Q>")
ANSWER = Message("assistant", "a", trained=True, opening="<START_A>", closing="<END_A>")


def test_the_template_writes_rows_as_they_were_trained() -> None:
    template, stop = chat_template(Conversation((QUESTION, ANSWER)))
    messages = [{"role": "user", "content": " How\nmany? "}, {"role": "assistant", "content": "72"}]
    assert render(template, messages) == "<s><START_Q> How\nmany? <END_Q><START_A>72<END_A>"
    assert render(template, messages[:1], prompt=True) == "<s><START_Q> How\nmany? <END_Q><START_A>"
    assert stop == ("<END_A>",)


def test_an_unknown_role_is_an_error_that_names_the_known_ones() -> None:
    template, _ = chat_template(Conversation((QUESTION, ANSWER)))
    with pytest.raises(ValueError, match="the roles user, assistant, not system"):
        render(template, [{"role": "system", "content": "x"}])


def test_messages_without_tokens_have_no_template() -> None:
    plain = Conversation((Message("user", "q", trained=False), Message("assistant", "a", trained=True)))
    assert chat_template(plain) == ("", ())
