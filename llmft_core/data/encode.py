"""Conversations → token ids and labels, appended together: the mask is exact by construction."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from llmft_core.errors import InputError, LlmftError, close_match
from llmft_core.values import IGNORED_LABEL, Conversation, EncodedExample, Message, RowProblem

ENCODER_VERSION = 1
"""Raised with every change of what an encoder returns: token caches of another version are not used."""

BATCH = 512
"""Conversations in one call of the tokenizer, which spreads a call over the cores."""

OnLong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class TooLong:
    """A row of `tokens` tokens, more than fit. `kept` is what is left of it under `truncate`; None: it is dropped."""

    tokens: int
    kept: EncodedExample | None


Encoded = EncodedExample | TooLong | RowProblem


class Encoder:
    """Encodes conversations with one tokenizer.

    The ids are those of `tokenizer(whole text, tags included)`, with one difference that is meant: a tag that occurs
    in somebody's text is text. So every text is encoded alone, by a private copy of the tokenizer that knows no
    special tokens in texts; what follows a tag is put behind an anchor token, so that it does not get the space that
    some tokenizers put before the first word of a text.
    """

    def __init__(
        self, tokenizer: Any, train_on: str, context_length: int, on_long: OnLong, tags: Sequence[str] = ()
    ) -> None:
        """`tokenizer` is a fast one of transformers that knows all tags; `train_on` is `completion`, `all` or roles
        (`user,assistant`); `tags` are tokens that are never read out of a text, besides the tokenizer's special ones.
        Raises LlmftError where the tokenizer is not a fast one."""
        from tokenizers import AddedToken, Tokenizer

        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise LlmftError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; its folder needs a tokenizer.json: "
                "give another with --model.tokenizer FOLDER"
            )
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.roles = {role.strip() for role in train_on.split(",")} - {"", "all", "completion"}
        self.context_length = context_length  # tokens
        self.on_long = on_long
        self.seen_roles: set[str] = set()
        self.start: list[int] = list(tokenizer("")["input_ids"])  # [BOS], or [] where the tokenizer begins without
        if self.start and self.start[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            self.start.pop()  # tokenizers that are told to end every text; where a row ends is decided here
        # Random, so that no text holds it; it never reaches a result.
        self._anchor = f"\ue000{secrets.token_hex(16)}\ue001"
        plain = json.loads(tokenizer.backend_tokenizer.to_str())
        plain |= {"truncation": None, "padding": None, "post_processor": None}
        added = plain["added_tokens"]
        for token in added:
            token["special"] = token["special"] or token["content"] in tags
        self._strips_right = {token["content"] for token in added if token["rstrip"]}
        self._strips_left = {token["content"] for token in added if token["lstrip"]}
        self._plain = Tokenizer.from_str(json.dumps(plain))
        self._plain.add_tokens([AddedToken(self._anchor, special=False, normalized=False)])
        self._plain.encode_special_tokens = True
        self._anchor_id = self._plain.token_to_id(self._anchor)
        self._ids: dict[str, int] = {}  # tag → id
        self._never = {token["id"]: token["content"] for token in added if token["special"]}
        self._never.pop(tokenizer.unk_token_id, None)
        self._never_ids = frozenset(self._never)

    def encode_many(self, conversations: Iterable[Conversation]) -> Iterator[Encoded]:
        """One result a conversation, in order: the example, TooLong (policies drop and truncate), or a RowProblem
        (too long under policy error; nothing in it is trained). Raises LlmftError for a tag that is not one token of
        the tokenizer, and where a row has no token that could end it."""
        remaining = iter(conversations)
        while batch := list(islice(remaining, BATCH)):
            texts = [text for conversation in batch for text in self._texts(conversation)]
            found = iter(self._plain.encode_batch_fast(texts, add_special_tokens=False))
            for conversation in batch:
                yield self._fit(self._assemble(conversation, found))

    def check_roles(self) -> None:
        """After the last row: raises InputError where `train_on` names a role that no row has."""
        unknown = sorted(self.roles - self.seen_roles)
        if unknown and self.seen_roles:
            existing = sorted(self.seen_roles)
            raise InputError(
                f"--data.train-on: no row has the role {unknown[0]}{close_match(unknown[0], existing)}; "
                f"there are {', '.join(existing)}; `completion` trains what the dataset format marks, `all` everything"
            )

    def _trained(self, message: Message) -> bool:
        if self.train_on == "completion":
            return message.trained
        return self.train_on == "all" or message.role in self.roles

    def _texts(self, conversation: Conversation) -> Iterator[str]:
        """What the tokenizer is asked for: every text that is not empty, behind the anchor unless it comes first."""
        first = True
        for message in conversation.messages:
            text = self._stripped(message)
            first = first and not message.opening
            if text:
                yield text if first else self._anchor + text
            first = first and not text and not message.closing

    def _stripped(self, message: Message) -> str:
        """The text without the whitespace that its tags swallow: some tokenizers' tags do."""
        text = message.text
        if message.opening in self._strips_right:
            text = text.lstrip()
        return text.rstrip() if message.closing in self._strips_left else text

    def _assemble(self, conversation: Conversation, found: Iterator[Any]) -> EncodedExample | RowProblem:
        everything = self.train_on == "all"
        ids = [] if conversation.starts else list(self.start)
        labels = list(ids) if everything else [IGNORED_LABEL] * len(ids)
        problem = None
        ends_open = False

        def append(new: list[int], trained: bool) -> None:
            ids.extend(new)
            labels.extend(new if trained else [IGNORED_LABEL] * len(new))

        for message in conversation.messages:
            self.seen_roles.add(message.role)
            trained = self._trained(message)
            if message.opening:
                append([self._id(message.opening)], everything)
            if self._stripped(message):
                text_ids: list[int] = next(found).ids
                if text_ids[:1] == [self._anchor_id]:
                    del text_ids[0]
                if not self._never_ids.isdisjoint(text_ids):
                    token = next(self._never[each] for each in text_ids if each in self._never)
                    problem = RowProblem(message.role, f"holds {token}, which this tokenizer cannot write as text")
                append(text_ids, trained)
            if message.closing:
                append([self._id(message.closing)], trained)
            ends_open = trained and not message.closing
        if ends_open:
            append([self._end()], True)
        if problem:
            return problem
        # A model predicts the second token first, so a label at position 0 trains nothing.
        if _untrained(labels[1:]):
            return RowProblem("", f"nothing in it is trained (--data.train-on {self.train_on})")
        return EncodedExample(tuple(ids), tuple(labels))

    def _fit(self, example: EncodedExample | RowProblem) -> Encoded:
        if isinstance(example, RowProblem) or len(example.input_ids) <= self.context_length:
            return example
        tokens = len(example.input_ids)
        if self.on_long == "error":
            return RowProblem("", f"is longer than --context-length {self.context_length}: {tokens} tokens")
        if self.on_long == "drop":
            return TooLong(tokens, None)
        # The last token stays: it ends the row, and a model that never sees ends never stops. What is left must train
        # something besides, or it would teach to end right after a question that was cut.
        head = self.context_length - 1
        if _untrained(example.labels[1:head]):
            return TooLong(tokens, None)
        return TooLong(
            tokens,
            EncodedExample(
                example.input_ids[:head] + example.input_ids[-1:], example.labels[:head] + example.labels[-1:]
            ),
        )

    def _id(self, tag: str) -> int:
        if tag not in self._ids:
            known = self.tokenizer.backend_tokenizer.token_to_id(tag)
            if known is None:
                raise LlmftError(
                    f"the tokenizer has no token {tag}: the dataset format must list it in its special_tokens"
                )
            self._ids[tag] = known
        return self._ids[tag]

    def _end(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise LlmftError(
                "the tokenizer has no end token and the dataset format no closing one, so the model would never "
                "learn to stop: use a format with closing tags, or give another tokenizer with --model.tokenizer"
            )
        return int(self.tokenizer.eos_token_id)


def _untrained(labels: Sequence[int]) -> bool:
    return labels.count(IGNORED_LABEL) == len(labels)
