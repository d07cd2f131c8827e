"""Conversations in the model's own chat template, cut into what is read and what is learnt.

A template is a program that writes one text from all messages, so where a message stands in that text is found out:
the template is run once on marks in place of the messages, which shows what it writes around them. Every row is then
run through it too, and must be what the marks foretold; a template that does more to a message than to trim it is not
guessed at. An answer is learnt from where the prompt ends that a server would send (`add_generation_prompt`) to the
token that ends it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmft_core.errors import InputError, one_line
from llmft_core.values import Conversation, Message, RowProblem

SPACES = " \t\n\t "
"""Put around a mark to see whether they are trimmed; no template writes them."""
TEMPLATE_ROLE = "template"
"""The role of all that is not trained by itself: what the template writes, and messages that are only read."""
WAY_OUT = "use another template with --model.tokenizer FOLDER, or rows with tags of their own (--dataset chat-tags)"


@dataclass(frozen=True)
class Form:
    """What the template writes around the messages of a certain sequence of roles: `around[i]` before message i,
    the last one after all. Of `around[i]` what comes from `starts[i]` on belongs to message i, and of `around[i + 1]`
    what comes before `ends[i]`. `trims[i]`: whether spaces at its left and right end are taken away."""

    around: tuple[str, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    trims: tuple[tuple[bool, bool], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template. Pickles; runs without torch, and in a process of its own.

    `text` is the Jinja source, empty where the model has none; `named` the tokens it may write by name (`bos_token`);
    `special` all special tokens of the tokenizer.
    """

    text: str
    named: Mapping[str, str]
    special: tuple[str, ...]
    _forms: dict[tuple[str, ...], Form | RowProblem] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> ChatTemplate:
        """The template `text` with the tokens of a tokenizer of transformers."""
        named = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        return cls(text, named, tuple(special))

    def literal(self, conversation: Conversation, train_on: str) -> Conversation | RowProblem:
        """The conversation as literal messages, each of a text and the special token after it, cut only there and
        where an answer begins or ends. `train_on` is the plan's: `completion`, `all` or roles.

        A RowProblem says what the template refuses (`raise_exception`) or would change in this row. Raises InputError
        where the template itself cannot be cut: there is none, it is no Jinja, it loses messages, it does not end
        answers.
        """
        messages = [{"role": message.role, "content": message.text} for message in conversation.messages]
        form = self._form(tuple(message.role for message in conversation.messages))
        if isinstance(form, RowProblem):
            return form
        texts = [_trimmed(message.text, *trim) for message, trim in zip(conversation.messages, form.trims, strict=True)]
        written = self._written(messages)
        if isinstance(written, RowProblem):
            return written
        expected = form.around[0] + "".join(
            f"{text}{after}" for text, after in zip(texts, form.around[1:], strict=True)
        )
        if written != expected:
            at = next((i for i, pair in enumerate(zip(written, expected, strict=False)) if pair[0] != pair[1]), 0)
            return RowProblem(
                "",
                "is changed by the chat template, not only trimmed: where it should write "
                f"{expected[at : at + 20]!r} it writes {written[at : at + 20]!r}",
            )
        roles = {role.strip() for role in train_on.split(",")}
        builder = _Builder(self._special_tokens)
        done = 0  # characters of around[i] that are written already
        for index, message in enumerate(conversation.messages):
            answers = message.role == "assistant"
            # Also where everything is trained, an answer is cut where a server would cut it: the same ids every time.
            cut = (
                message.trained
                if train_on == "completion"
                else message.role in roles or (train_on == "all" and answers)
            )
            role = message.role if cut else TEMPLATE_ROLE
            start, end = max(form.starts[index], done), form.ends[index]
            builder.scaffold(form.around[index][done:start], TEMPLATE_ROLE, False)
            builder.scaffold(form.around[index][start:], role, cut)
            builder.text(texts[index], role, cut)
            builder.scaffold(form.around[index + 1][:end], role, cut)
            done = end
        # What the template writes after the end of the last message teaches nothing, and a row ends with its end.
        return Conversation(builder.finish(), starts=True)

    def _form(self, roles: tuple[str, ...]) -> Form | RowProblem:
        if roles not in self._forms:
            self._forms[roles] = self._found_form(roles)
        return self._forms[roles]

    def _found_form(self, roles: Sequence[str]) -> Form | RowProblem:
        # Random, so that neither the template nor a text has them.
        marks = [f"\ue000{secrets.token_hex(8)}\ue001" for _ in roles]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        written = self._written(messages)
        spaced = self._written(
            [{**message, "content": f"{SPACES}{message['content']}{SPACES}"} for message in messages]
        )
        if isinstance(written, RowProblem):
            return written
        if isinstance(spaced, RowProblem):
            return spaced
        around: list[str] = []
        trims: list[tuple[bool, bool]] = []
        rest = written
        for role, mark in zip(roles, marks, strict=True):
            before, found, rest = rest.partition(mark)
            if not found or mark in rest or spaced.count(mark) != 1:
                raise InputError(
                    f"the model's chat template leaves out, repeats or changes a message of the {role}, so what is "
                    f"trained cannot be told: {WAY_OUT}"
                )
            around.append(before)
            left, _, right = spaced.partition(mark)
            trims.append((not left.endswith(SPACES), not right.startswith(SPACES)))
        around.append(rest)
        starts = []
        for index, role in enumerate(roles):
            start = len(around[index])
            if role == "assistant":
                prompt = self._written(messages[:index], prompt=True)
                if isinstance(prompt, RowProblem):
                    return prompt
                before = written[: written.index(marks[index])]
                start -= len(before) - len(prompt)
                if not before.startswith(prompt) or start < 0:
                    raise InputError(
                        "the model's chat template does not write the prompt of an answer as it writes the answered "
                        f"one (…{prompt[-30:]!r}, but …{before[-30:]!r}): {WAY_OUT}"
                    )
            starts.append(start)
        ends = [self._end(role, after) for role, after in zip(roles, around[1:], strict=True)]
        for index, (role, end) in enumerate(zip(roles, ends, strict=True)):
            if role == "assistant" and not end and index + 1 < len(roles):
                raise InputError(
                    "the model's chat template ends an answer in the middle of a chat without a special token "
                    f"({around[index + 1][:30]!r} follows it), so the model would not learn to stop: {WAY_OUT}"
                )
        return Form(tuple(around), tuple(starts), tuple(ends), tuple(trims))

    def _end(self, role: str, after: str) -> int:
        """Characters of what follows a message up to the end of its first special token; 0: there is none, or it
        begins the next one."""
        found = self._special_tokens.search(after) if self.special else None
        begins = found is not None and found.group() == self.named.get("bos_token") != self.named.get("eos_token")
        return 0 if found is None or begins else found.end()

    def _written(self, messages: Sequence[Mapping[str, str]], prompt: bool = False) -> str | RowProblem:
        """The template's text; a RowProblem where it refuses."""
        if not self.text:
            raise InputError(f"the model has no chat template, and these rows are chats: {WAY_OUT}")
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                [list(messages)], chat_template=self.text, add_generation_prompt=prompt, **self.named
            )
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"the model's chat template is no Jinja: {one_line(error)}; {WAY_OUT}") from error
        except Exception as error:  # noqa: BLE001 - a template is a stranger's program, and says no in many ways
            return RowProblem("", f"is refused by the model's chat template: {one_line(error)}")
        return str(text)

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)")


NO_TEMPLATE = ChatTemplate("", {}, ())


class _Builder:
    """Literal messages: neighbouring texts of one role are one, and special tokens stand before and after them."""

    def __init__(self, special: re.Pattern[str]) -> None:
        self._special = special
        self._messages: list[Message] = []
        self._opening = ""
        self._text = ""
        self._role = TEMPLATE_ROLE
        self._trained = False

    def text(self, text: str, role: str, trained: bool) -> None:
        """A message's text, in which nothing is a special token."""
        if text:
            self._turn_to(role, trained)
            self._text += text

    def scaffold(self, text: str, role: str, trained: bool) -> None:
        """What the template writes."""
        done = 0
        for found in self._special.finditer(text):
            self.text(text[done : found.start()], role, trained)
            self._turn_to(role, trained)
            if trained or self._text or self._opening:  # an opening token is never trained
                self._flush(found.group())
            else:
                self._opening = found.group()
            done = found.end()
        self.text(text[done:], role, trained)

    def finish(self) -> tuple[Message, ...]:
        """All of them."""
        self._flush()
        return tuple(self._messages)

    def _turn_to(self, role: str, trained: bool) -> None:
        if (role, trained) != (self._role, self._trained):
            self._flush()
            self._role, self._trained = role, trained

    def _flush(self, closing: str = "") -> None:
        if self._opening or self._text or closing:
            self._messages.append(Message(self._role, self._text, self._trained, self._opening, closing))
        self._opening = self._text = ""


def _trimmed(text: str, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text
