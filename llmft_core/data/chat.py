"""The tags of a format as a chat template, so that what is served is prompted exactly as it was trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from llmft_core.values import Conversation, Role


def roles_of(conversation: Conversation) -> tuple[Role, ...]:
    """The roles of one row, for formats that do not say theirs: all rows have its form."""
    trained = {message.role for message in conversation.messages if message.trained}
    found = {
        message.role: Role(message.role, message.opening, message.closing, message.role in trained)
        for message in conversation.messages
    }
    return tuple(found.values())


def trained_roles(roles: Sequence[Role], train_on: str) -> tuple[Role, ...]:
    """The roles, each trained as the plan says (`completion`: as the format does); `all` trains answers too, and which
    these are the format says."""
    if train_on in ("completion", "all"):
        return tuple(roles)
    chosen = {name.strip() for name in train_on.split(",")}
    return tuple(replace(role, trained=role.name in chosen) for role in roles)


def stop_tokens(roles: Sequence[Role]) -> tuple[str, ...]:
    """The tokens that end a trained message."""
    return tuple(dict.fromkeys(role.closing for role in roles if role.trained and role.closing))


def chat_template(roles: Sequence[Role], begins: bool = True) -> str:
    """A Jinja chat template for rows with these tags: BOS where rows begin with it, then each message between its
    role's tokens; with `add_generation_prompt` it opens the role that answers. A role is known by its name and by
    `served_as`.

    Empty where messages have no opening tokens: then the plain text is the prompt.
    """
    trained = [role for role in roles if role.trained]
    if not trained or not all(role.opening for role in roles):
        return ""
    answers = next((role for role in trained if role.served_as == "assistant"), trained[-1])
    names = {role.name for role in roles}
    known: list[str] = []
    branches = []
    for role in roles:
        called = [role.name, *({role.served_as} - names - {""})]
        known += called
        branches.append(
            f"if message['role'] in {_quoted(called)} -%}}"
            f"{{{{ {_quoted(role.opening)} + message['content'] + {_quoted(role.closing)} }}}}"
        )
    unknown = _quoted(f"this model knows the roles {', '.join(known)}, not ")
    return (
        ("{{ bos_token }}" if begins else "")
        + "{%- for message in messages -%}"
        + "{%- "
        + "{%- el".join(branches)
        + f"{{%- else -%}}{{{{ raise_exception({unknown} + message['role']) }}}}{{%- endif -%}}{{%- endfor -%}}"
        + f"{{%- if add_generation_prompt -%}}{{{{ {_quoted(answers.opening)} }}}}{{%- endif -%}}"
    )


def _quoted(value: str | list[str]) -> str:
    """As a literal of Jinja, which takes two escaped halves of a character for two characters."""
    return json.dumps(value, ensure_ascii=False)
