"""The chat template says what the encoder does."""

from __future__ import annotations

import jinja2
import pytest

from llmft_core.data.chat import chat_template, roles_of, stop_tokens, trained_roles
from llmft_core.values import Conversation, Message, Role


def render(template: str, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    def raise_exception(text: str) -> None:
        raise ValueError(text)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(messages=messages, bos_token="<s>", add_generation_prompt=prompt)


QUESTION = Message("user", "q", trained=False, opening="<START_Q>", closing="<END_Q>")
ANSWER = Message("assistant", "a", trained=True, opening="<START_A>", closing="<END_A>")
ROLES = roles_of(Conversation((QUESTION, ANSWER)))


def test_the_template_writes_rows_as_they_were_trained() -> None:
    template = chat_template(ROLES)
    messages = [{"role": "user", "content": " How\nmany? "}, {"role": "assistant", "content": "72"}]
    assert render(template, messages) == "<s><START_Q> How\nmany? <END_Q><START_A>72<END_A>"
    assert render(template, messages[:1], prompt=True) == "<s><START_Q> How\nmany? <END_Q><START_A>"
    assert stop_tokens(ROLES) == ("<END_A>",)


def test_an_unknown_role_is_an_error_that_names_the_known_ones() -> None:
    template = chat_template(ROLES)
    with pytest.raises(ValueError, match="the roles user, assistant, not system"):
        render(template, [{"role": "system", "content": "x"}])


def test_messages_without_tokens_have_no_template() -> None:
    plain = Conversation((Message("user", "q", trained=False), Message("assistant", "a", trained=True)))
    assert chat_template(roles_of(plain)) == ""
    assert stop_tokens(roles_of(plain)) == ()


def test_a_role_is_known_by_its_name_and_as_servers_call_it() -> None:
    roles = [
        Role("FRAGE", '<"😀\\>', "</}}>", served_as="user"),
        Role("ANTWORT", "<{{A>", "</A>", True, served_as="assistant"),
    ]
    template = chat_template(roles, begins=False)
    for user, assistant in (("FRAGE", "ANTWORT"), ("user", "assistant")):
        messages = [{"role": user, "content": "q"}, {"role": assistant, "content": "a"}]
        assert render(template, messages) == '<"😀\\>q</}}><{{A>a</A>'
        assert render(template, messages[:1], prompt=True) == '<"😀\\>q</}}><{{A>'
    with pytest.raises(ValueError, match="the roles FRAGE, user, ANTWORT, assistant, not system"):
        render(template, [{"role": "system", "content": "x"}])


def test_the_plan_says_which_role_is_opened_and_which_tokens_stop() -> None:
    both = trained_roles(ROLES, "assistant, user")
    assert stop_tokens(both) == ("<END_Q>", "<END_A>")
    user = trained_roles(ROLES, "user")
    assert stop_tokens(user) == ("<END_Q>",)
    assert render(chat_template(user), [], prompt=True) == "<s><START_Q>"
    assert trained_roles(ROLES, "all") == trained_roles(ROLES, "completion") == ROLES
