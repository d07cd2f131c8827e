"""Conversations → token ids and labels, appended together: the mask is exact by construction."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmft_core.errors import InputError, LlmftError, close_match
from llmft_core.values import IGNORED_LABEL, Conversation, EncodedExample, Message, RowProblem

ENCODER_VERSION = 1
"""Raised with every change of what an encoder returns: token caches of another version are not used."""

BATCH = 512
"""Conversations in one call of the tokenizer, which spreads a call over the cores."""

JOINED = 4
"""Rows in one text for the tokenizer: fewer calls; with many more its own lists of tokens get slow."""

_NOTHING = -1
"""Takes the place of an anchor for which no token stands."""

OnLong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class TooLong:
    """A row of `tokens` tokens, more than fit. `kept` is what is left of it under `truncate`; None: it is dropped."""

    tokens: int
    kept: EncodedExample | None


Encoded = EncodedExample | TooLong | RowProblem


@dataclass(frozen=True)
class EncodedBatch:
    """What became of some conversations. Rows are counted in their order, from 0."""

    ids: npt.NDArray[np.int32]  # (tokens,): the rows that are kept, behind one another
    trained: npt.NDArray[np.uint8]  # (tokens,): 1 where a token is its own label
    lengths: npt.NDArray[np.int64]  # (kept rows,), tokens
    kept: npt.NDArray[np.int64]  # (kept rows,): which rows these are
    problems: dict[int, RowProblem]  # by row
    too_long: dict[int, int]  # row → tokens it had; it is kept where it was cut


@dataclass(frozen=True)
class EncoderRecipe:
    """All that an encoder is made of, as plain data: a worker process makes its own from it, without transformers."""

    tokenizer: str  # tokenizer.json
    start: tuple[int, ...]  # (BOS,), or () where the tokenizer begins without
    end_id: int | None
    unknown_id: int | None
    train_on: str
    context_length: int  # tokens
    on_long: OnLong
    tags: tuple[str, ...] = ()
    """Tokens that are never read out of a text, besides the tokenizer's special ones."""

    @classmethod
    def of(
        cls, tokenizer: Any, train_on: str, context_length: int, on_long: OnLong, tags: Sequence[str] = ()
    ) -> EncoderRecipe:
        """`tokenizer` is a fast one of transformers that knows all tags; `train_on` is `completion`, `all` or roles
        (`user,assistant`). Raises LlmftError where the tokenizer is not a fast one."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise LlmftError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; its folder needs a tokenizer.json: "
                "give another with --model.tokenizer FOLDER"
            )
        start = list(tokenizer("")["input_ids"])
        if start and start[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            start.pop()  # tokenizers that are told to end every text; where a row ends is decided here
        return cls(
            tokenizer.backend_tokenizer.to_str(),
            tuple(start),
            tokenizer.eos_token_id,
            tokenizer.unk_token_id,
            train_on,
            context_length,
            on_long,
            tuple(tags),
        )

    @property
    def roles(self) -> frozenset[str]:
        """The roles that `train_on` names, if it names any."""
        return frozenset({role.strip() for role in self.train_on.split(",")} - {"", "all", "completion"})

    def check_roles(self, seen: Set[str]) -> None:
        """`seen` are the roles of all rows: raises InputError where `train_on` names another one."""
        unknown = sorted(self.roles - seen)
        if unknown and seen:
            existing = sorted(seen)
            raise InputError(
                f"--data.train-on: no row has the role {unknown[0]}{close_match(unknown[0], existing)}; "
                f"there are {', '.join(existing)}; `completion` trains what the dataset format marks, `all` everything"
            )


@dataclass
class _Layout:
    """A batch as texts for the tokenizer, with an anchor wherever the result has a token that is no text: start, tag,
    end. What is said of an anchor and of the text behind it stands in lists, one entry an anchor."""

    anchor: str
    texts: list[str] = field(default_factory=list)
    first_anchors: list[int] = field(default_factory=list)  # of each row
    tokens: list[int] = field(default_factory=list)  # what takes the anchor's place, or _NOTHING
    trained: list[bool] = field(default_factory=list)
    text_trained: list[bool] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)  # whose text it is
    _parts: list[str] = field(default_factory=list)  # of the last text, which is not in `texts` yet

    def begin_row(self, start: Sequence[int], trained: bool, *, apart: bool) -> None:
        """`start` becomes the row's first tokens. `apart`: its text must be the first that the tokenizer sees."""
        if apart or len(self.first_anchors) % JOINED == 0:
            self.end_text()
        else:
            self._parts += [self.anchor] * len(start)
        self.first_anchors.append(len(self.tokens))
        for token in start:
            self._note(token, trained)

    def tag(self, token: int, trained: bool) -> None:
        self._parts.append(self.anchor)
        self._note(token, trained)

    def text(self, text: str, trained: bool, role: str) -> None:
        if self._parts and self._parts[-1] != self.anchor:  # right behind another text
            self.tag(_NOTHING, False)
        self._parts.append(text)
        self.text_trained[-1] = trained
        self.roles[-1] = role

    def end_text(self) -> None:
        if self.first_anchors:
            self.texts.append("".join(self._parts))
        self._parts.clear()

    def _note(self, token: int, trained: bool) -> None:
        self.tokens.append(token)
        self.trained.append(trained)
        self.text_trained.append(False)
        self.roles.append("")


class Encoder:
    """Encodes conversations with one tokenizer.

    The ids are those of `tokenizer(whole text, tags included)`, with one difference that is meant: a tag that occurs
    in somebody's text is text. So texts are encoded by a private copy of the tokenizer that knows no
    special tokens in texts; tags are an anchor token in what it reads, so that a text behind one does not get the
    space that some tokenizers put before the first word of a text, and each anchor that comes out becomes its tag.
    """

    def __init__(self, recipe: EncoderRecipe) -> None:
        from tokenizers import AddedToken, Tokenizer

        self.recipe = recipe
        self._roles = recipe.roles
        self.seen_roles: set[str] = set()
        # Random, so that no text holds it; it never reaches a result.
        self._anchor = f"\ue000{secrets.token_hex(16)}\ue001"
        plain = json.loads(recipe.tokenizer)
        plain |= {"truncation": None, "padding": None, "post_processor": None}
        added = plain["added_tokens"]
        for token in added:
            token["special"] = token["special"] or token["content"] in recipe.tags
        self._strips_right = {token["content"] for token in added if token["rstrip"]}
        self._strips_left = {token["content"] for token in added if token["lstrip"]}
        self._plain = Tokenizer.from_str(json.dumps(plain))
        self._plain.add_tokens([AddedToken(self._anchor, special=False, normalized=False)])
        self._plain.encode_special_tokens = True
        self._anchor_id: int = self._plain.token_to_id(self._anchor) or 0  # never 0: it was just added
        self._ids: dict[str, int] = {}  # tag → id
        self._never = {token["id"]: token["content"] for token in added if token["special"]}
        self._never.pop(recipe.unknown_id, None)
        self._is_never = np.zeros(max(self._plain.get_vocab().values()) + 1, dtype=bool)  # by id
        self._is_never[list(self._never)] = True
        self._start = recipe.start or (_NOTHING,)
        self._start_anchors = [self._anchor_id] * len(self._start)

    def encode_many(self, conversations: Iterable[Conversation]) -> Iterator[Encoded]:
        """One result a conversation, in order: the example, TooLong (policies drop and truncate), or a RowProblem
        (too long under policy error; nothing in it is trained). Raises LlmftError for a tag that is not one token of
        the tokenizer, and where a row has no token that could end it."""
        remaining = iter(conversations)
        while rows := list(islice(remaining, BATCH)):
            batch = self.encode_batch(rows)
            ends = np.cumsum(batch.lengths)
            examples = {}
            for row, end, length in zip(batch.kept.tolist(), ends.tolist(), batch.lengths.tolist(), strict=True):
                ids = batch.ids[end - length : end]
                labels = np.where(batch.trained[end - length : end], ids, IGNORED_LABEL)
                examples[row] = EncodedExample(tuple(ids.tolist()), tuple(labels.tolist()))
            for row in range(len(rows)):
                if row in batch.problems:
                    yield batch.problems[row]
                elif row in batch.too_long:
                    yield TooLong(batch.too_long[row], examples.get(row))
                else:
                    yield examples[row]

    def encode_batch(self, conversations: Sequence[Conversation]) -> EncodedBatch:
        """As `encode_many`, in arrays: nothing is done token by token, and little row by row."""
        layout = self._laid_out(conversations)
        found: list[int] = []
        for encoding in self._plain.encode_batch_fast(layout.texts, add_special_tokens=False):
            found += self._start_anchors
            found += encoding.ids
        ids = np.array(found, dtype=np.int32)
        anchors = np.flatnonzero(ids == self._anchor_id)
        if len(anchors) != len(layout.tokens):
            raise LlmftError(
                f"the tokenizer gave {len(anchors)} tokens where {len(layout.tokens)} were to be: two of its tokens "
                "have one id; give another with --model.tokenizer FOLDER"
            )
        starts = anchors[layout.first_anchors]
        problems: dict[int, RowProblem] = {}
        for position in np.flatnonzero(self._is_never[ids]).tolist():
            row = int(np.searchsorted(starts, position, side="right")) - 1
            role = layout.roles[int(np.searchsorted(anchors, position, side="right")) - 1]
            token = self._never[int(ids[position])]
            problems.setdefault(row, RowProblem(role, f"holds {token}, which this tokenizer cannot write as text"))
        trained = np.repeat(np.array(layout.text_trained, dtype=np.uint8), np.diff(anchors, append=len(ids)))
        trained[anchors] = layout.trained
        ids[anchors] = layout.tokens
        there = ids != _NOTHING
        starts = (np.cumsum(there) - there)[starts]  # the same places, counted without what stands for nothing
        return self._fitted(ids[there], trained[there], starts, problems)

    def _trained(self, message: Message) -> bool:
        if self.recipe.train_on == "completion":
            return message.trained
        return self.recipe.train_on == "all" or message.role in self._roles

    def _laid_out(self, conversations: Sequence[Conversation]) -> _Layout:
        everything = self.recipe.train_on == "all"
        layout = _Layout(self._anchor)
        for conversation in conversations:
            messages = conversation.messages
            layout.begin_row(self._start, everything, apart=not (messages and messages[0].opening))
            ends_open = False
            for message in messages:
                self.seen_roles.add(message.role)
                trained = self._trained(message)
                if message.opening:
                    layout.tag(self._id(message.opening), everything)
                if text := self._stripped(message):
                    layout.text(text, trained, message.role)
                if message.closing:
                    layout.tag(self._id(message.closing), trained)
                ends_open = trained and not message.closing
            if ends_open:
                layout.tag(self._end(), True)
        layout.end_text()
        return layout

    def _stripped(self, message: Message) -> str:
        """The text without the whitespace that its tags swallow: some tokenizers' tags do."""
        text = message.text
        if message.opening in self._strips_right:
            text = text.lstrip()
        return text.rstrip() if message.closing in self._strips_left else text

    def _fitted(
        self,
        ids: npt.NDArray[np.int32],
        trained: npt.NDArray[np.uint8],
        starts: npt.NDArray[np.int64],
        problems: dict[int, RowProblem],
    ) -> EncodedBatch:
        """Rows [starts[i], starts[i + 1]) without those that cannot be used or are too long."""
        ends = np.append(starts[1:], len(ids))
        before = np.append(0, np.cumsum(trained, dtype=np.int64))  # trained tokens before each position
        # A model predicts the second token first, so a label at position 0 trains nothing.
        for row in np.flatnonzero(before[ends] == before[np.minimum(starts + 1, ends)]).tolist():
            problems.setdefault(
                row, RowProblem("", f"nothing in it is trained (--data.train-on {self.recipe.train_on})")
            )
        lengths, context = ends - starts, self.recipe.context_length
        wanted = np.ones(len(ids), dtype=bool)
        too_long: dict[int, int] = {}
        dropped = []
        for row in np.flatnonzero(lengths > context).tolist():
            if row in problems:
                continue
            tokens, start = int(lengths[row]), int(starts[row])
            # The last token stays: it ends the row, and a model that never sees ends never stops. What is left must
            # train something besides, or it would teach to end right after a question that was cut.
            head = start + context - 1
            if self.recipe.on_long == "error":
                problems[row] = RowProblem("", f"is longer than --context-length {context}: {tokens} tokens")
                continue
            too_long[row] = tokens
            if self.recipe.on_long == "truncate" and before[head] > before[min(start + 1, head)]:
                wanted[head : start + tokens - 1] = False
                lengths[row] = context
            else:
                dropped.append(row)
        is_kept = np.ones(len(starts), dtype=bool)
        for row in (*problems, *dropped):
            is_kept[row] = False
            wanted[starts[row] : ends[row]] = False
        return EncodedBatch(ids[wanted], trained[wanted], lengths[is_kept], np.flatnonzero(is_kept), problems, too_long)

    def _id(self, tag: str) -> int:
        if tag not in self._ids:
            known = self._plain.token_to_id(tag)
            if known is None:
                raise LlmftError(
                    f"the tokenizer has no token {tag}: the dataset format must list it in its special_tokens"
                )
            self._ids[tag] = known
        return self._ids[tag]

    def _end(self) -> int:
        if self.recipe.end_id is None:
            raise LlmftError(
                "the tokenizer has no end token and the dataset format no closing one, so the model would never "
                "learn to stop: use a format with closing tags, or give another tokenizer with --model.tokenizer"
            )
        return self.recipe.end_id
