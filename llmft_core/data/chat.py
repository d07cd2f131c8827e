"""A conversation's form as a chat template, so that what is served is prompted exactly as it was trained."""

from __future__ import annotations

import json

from llmft_core.values import Conversation


def chat_template(conversation: Conversation) -> tuple[str, tuple[str, ...]]:
    """A Jinja chat template for rows like this one, and the tokens that end a trained message.

    Empty where messages have no opening tokens: then the plain text is the prompt. The template writes BOS, then each
    message between its role's tokens; with `add_generation_prompt` it opens the last trained role.
    """
    tags = {message.role: (message.opening, message.closing) for message in conversation.messages}
    trained = [message.role for message in conversation.messages if message.trained]
    stop = tuple(dict.fromkeys(tags[role][1] for role in trained if tags[role][1]))
    if not trained or not all(opening for opening, _ in tags.values()):
        return "", stop
    branches = []
    for number, (role, (opening, closing)) in enumerate(tags.items()):
        word = "if" if number == 0 else "elif"
        branches.append(
            f"{{%- {word} message['role'] == {json.dumps(role)} -%}}"
            f"{{{{ {json.dumps(opening)} + message['content'] + {json.dumps(closing)} }}}}"
        )
    known = ", ".join(tags)
    branches.append(
        "{%- else -%}{{ raise_exception('this model knows the roles "
        + known
        + ", not ' + message['role']) }}{%- endif -%}"
    )
    return (
        "{{ bos_token }}{%- for message in messages -%}"
        + "".join(branches)
        + "{%- endfor -%}{%- if add_generation_prompt -%}{{ "
        + json.dumps(tags[trained[-1]][0])
        + " }}{%- endif -%}"
    ), stop
