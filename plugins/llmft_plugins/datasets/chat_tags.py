"""Dialogues as one text with tags of your own: `<USER>how is the weather?</USER><ASSISTANT>Sunny.</ASSISTANT>`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from llmft_core import Conversation, DatasetFormat, Message, Options, Role, RowProblem, SourceOptions, hookimpl
from llmft_plugins.datasets.fields import missing_field, wrong_text
from llmft_plugins.datasets.tags import Tags, read_tags

llmft_api = 1

FIELD = "input"
OUTSIDE = "outside"
"""The role of what stands outside of all tags."""
SHOWN = 30  # characters of a text that is quoted
NAME = r"/?\w[\w-]{0,39}"  # what may stand between the signs around a tag's name


class ChatTagsOptions(SourceOptions):
    """Where rows and tags are, and what is an error in them."""

    tokens: str = Field("", description="file or URI that declares the tags; default: the tokens.json beside the rows")
    outside: Literal["error", "context"] = Field(
        "error", description="text outside of all tags: an error, or context that the model reads"
    )
    unknown_tags: Literal["error", "text"] = Field(
        "error", description="what looks like a tag and is not declared (</USR>): an error, or text"
    )


class ChatTags(DatasetFormat):
    """Rows `{"input": …}`. Every declared tag in the text is a tag; there is no way to write one as text."""

    name: ClassVar[str] = "chat-tags"
    summary: ClassVar[str] = "dialogues as text with tags of your own: train.jsonl, test.jsonl and tokens.json"
    options_type: ClassVar[type[Options]] = ChatTagsOptions
    keys: ClassVar[tuple[str, ...]] = (FIELD,)
    companions: ClassVar[Mapping[str, str]] = {"tokens.json": "tokens"}

    def read_companion(self, name: str, content: bytes) -> None:
        tags = read_tags(content)
        self.special_tokens = tags.tokens
        self.roles = tags.roles
        self._opens = {role.opening: role for role in tags.roles}
        self._closes = frozenset(role.closing for role in tags.roles)
        self._single = frozenset(tags.single)
        # Longest first: of <A> and <A><B> the longer one is meant. What only looks like a tag comes last.
        words = [re.escape(tag) for tag in sorted(tags.tokens, key=len, reverse=True)]
        shapes = _shapes(tags) if self.options.unknown_tags == "error" else []
        self._tag = re.compile("|".join(words + shapes))
        self._folded = {tag.casefold() for tag in tags.tokens}
        self._capitals = all(tag == tag.upper() for tag in tags.tokens)

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        problem = missing_field(row, [FIELD]) or wrong_text(row[FIELD], FIELD)
        return problem or self._conversation(row[FIELD])

    def _conversation(self, text: str) -> Conversation | RowProblem:
        messages: list[Message] = []
        tags = [found for found in self._tag.finditer(text) if self._is_tag(found.group())]
        role: Role | None = None  # whose span is open
        opening, opened, first, done = "", 0, 0, 0  # its tag until that is written, where, its first message; text read
        for index, found in enumerate(tags):
            tag, at, before = found.group(), found.start(), text[done : found.start()]
            done = found.end()
            if tag not in self.special_tokens:
                return self._unknown(tag, at)
            if role is None:
                if before and self.options.outside == "error":
                    return _outside(before, at - len(before))
                if tag in self._closes:
                    return _problem(f"has a closing tag too many: {tag} at character {at + 1} closes nothing")
                if tag in self._single:
                    messages.append(Message(OUTSIDE, before, trained=False, closing=tag))
                    continue
                if before:
                    messages.append(Message(OUTSIDE, before, trained=False))
                role, opening, opened, first = self._opens[tag], tag, at, len(messages)
            elif tag == role.closing or tag in self._single:
                messages.append(Message(role.name, before, role.trained, opening, closing=tag))
                opening = ""
                if tag == role.closing:
                    if len(messages) == first + 1 and not before.strip():
                        return _problem(f"has an empty span: {role.opening} at character {opened + 1} holds no text")
                    role = None
            else:
                return self._misplaced(tag, at, role, opened, [later.group() for later in tags[index + 1 :]])
        if role is not None:
            return _problem(
                f"has a tag that is not closed: {role.opening} at character {opened + 1}; {role.closing} is missing"
            )
        rest = text[done:]
        if rest and self.options.outside == "error":
            return _outside(rest, done)
        if rest:
            messages.append(Message(OUTSIDE, rest, trained=False))
        return Conversation(tuple(messages))

    def _is_tag(self, tag: str) -> bool:
        """Whether it is one, or looks too much like one: where all tags are in capitals, <b> does not."""
        if tag in self.special_tokens or not self._capitals:
            return True
        return tag == tag.upper() or tag.casefold() in self._folded

    def _unknown(self, tag: str, at: int) -> RowProblem:
        import difflib

        folded = {known.casefold(): known for known in self.special_tokens}
        close = difflib.get_close_matches(tag.casefold(), list(folded), n=1)
        meant = f" (did you mean {folded[close[0]]}?)" if close else ""
        return _problem(
            f"has an unknown tag: {tag} at character {at + 1}{meant}",
            "declare it in tokens.json, or take it for text with --dataset.unknown-tags text",
        )

    def _misplaced(self, tag: str, at: int, role: Role, opened: int, later: list[str]) -> RowProblem:
        """A tag inside an open span that does not belong there. `later`: the tags after it."""
        here, there = f"{tag} at character {at + 1}", f"{role.opening} of character {opened + 1}"
        if tag in self._closes:
            return _problem(f"has a wrong closing tag: {here}, where {role.closing} would close {there}")
        if role.closing not in later:
            return _problem(f"has a tag that is not closed: {there}; {role.closing} is missing before {here}")
        inner = self._opens[tag].closing
        closings = [each for each in later if each in self._closes]
        if closings[0] == role.closing != inner and inner in closings:
            return _problem(f"has crossed tags: {here} opens inside {there} and is closed after it")
        return _problem(f"has nested tags: {here} opens inside {there}")


def _problem(reason: str, *advice: str) -> RowProblem:
    return RowProblem(FIELD, "; ".join([reason, *advice]))


def _outside(text: str, start: int) -> RowProblem:
    quoted = repr(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")
    return _problem(
        f"has text outside of tags: {quoted} at character {start + 1}",
        "remove it, or keep it as context with --dataset.outside context",
    )


def _shapes(tags: Tags) -> list[str]:
    """Patterns of what looks like a declared tag: the same signs around a name."""
    frames: dict[tuple[str, ...], None] = {}
    for tag in tags.tokens:
        found = re.fullmatch(r"([^\w/]+)/?\w.*?([^\w/]+)", tag)
        if found:
            frames[found.groups()] = None
    return [f"{re.escape(before)}{NAME}{re.escape(after)}" for before, after in frames]


@hookimpl
def llmft_dataset_formats() -> list[type[DatasetFormat]]:
    return [ChatTags]
