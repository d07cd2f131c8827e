"""Blocks of rows → arrays of tokens: what worker processes do, and what this process does itself with small data."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmft_core.data.blocks import Block
from llmft_core.data.checks import FormatFailed, parse_row
from llmft_core.data.encode import BATCH, EncodedBatch, Encoder, EncoderRecipe
from llmft_core.errors import InputError, LlmftError
from llmft_core.extensions import DatasetFormat
from llmft_core.values import Conversation, RowProblem


@dataclass(frozen=True)
class Work:
    """All that a process needs to encode blocks. It pickles, if the format does."""

    dataset: DatasetFormat
    recipe: EncoderRecipe


@dataclass(frozen=True)
class EncodedBlock:
    """What became of a block. `ids` and `trained` are the kept rows behind one another."""

    file: int
    read: int  # rows that are not blank
    ids: npt.NDArray[np.int32]  # (tokens,)
    trained: npt.NDArray[np.uint8]  # (tokens,)
    lengths: npt.NDArray[np.int64]  # (kept rows,), tokens
    lines: npt.NDArray[np.int32]  # (kept rows,)
    hashes: npt.NDArray[np.uint64]  # (kept rows,): equal for rows of equal tokens
    longest: int  # tokens of the longest row before any was dropped or cut
    problems: tuple[tuple[int, RowProblem, bytes], ...]  # line, what is wrong, the row as it lies in the file
    dropped: tuple[int, ...]  # lines of rows longer than the context
    cut: tuple[int, ...]  # lines of rows shortened to the context
    roles: frozenset[str]  # of all messages
    tags: frozenset[str]  # that occurred


@dataclass(frozen=True)
class Failure:
    """Why a block could not be encoded: a fault of no row. `line` is that of the row at which it happened, if one."""

    line: int | None
    message: str
    kind: type[LlmftError] = LlmftError


class _RowFailed(Exception):
    """(line, message)."""


class BlockEncoder:
    """Encodes blocks in this process."""

    def __init__(self, work: Work) -> None:
        self._dataset = work.dataset
        self._encoder = Encoder(work.recipe)

    def answer(self, block: Block) -> EncodedBlock | Failure:
        """The encoded block. Whatever goes wrong is a Failure, so that it reaches the driver as one line."""
        try:
            return self._encode(block)
        except _RowFailed as error:
            return Failure(*error.args)
        except LlmftError as error:
            return Failure(None, str(error), InputError if isinstance(error, InputError) else LlmftError)
        except Exception as error:  # noqa: BLE001  raised by the driver
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            return Failure(block.first, f"this row or one after it: {type(error).__name__} at {where}: {error}")

    def _encode(self, block: Block) -> EncodedBlock:
        made = _Making()
        encoder = self._encoder
        encoder.seen_roles.clear()
        encoder.seen_tags.clear()
        waiting: list[Conversation] = []
        lines: list[int] = []
        for line, row in block.rows():
            made.read += 1
            try:
                parsed = row if isinstance(row, RowProblem) else parse_row(self._dataset, row)
            except FormatFailed as error:
                raise _RowFailed(line, str(error)) from error
            if isinstance(parsed, RowProblem):
                made.problems[line] = parsed
                continue
            waiting.append(parsed)
            lines.append(line)
            if len(waiting) == BATCH:
                made.add(encoder.encode_batch(waiting), lines)
                waiting, lines = [], []
        if waiting:
            made.add(encoder.encode_batch(waiting), lines)
        return made.block(block, frozenset(encoder.seen_roles), frozenset(encoder.seen_tags))


@dataclass
class _Making:
    """An encoded block, batch by batch."""

    read: int = 0
    longest: int = 0
    problems: dict[int, RowProblem] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    batches: list[EncodedBatch] = field(default_factory=list)
    lines: list[npt.NDArray[np.int32]] = field(default_factory=list)

    def add(self, batch: EncodedBatch, lines: list[int]) -> None:
        """`lines`: of the batch's rows."""
        kept = set(batch.kept.tolist()) if batch.too_long else set()
        for row, tokens in batch.too_long.items():
            (self.cut if row in kept else self.dropped).append(lines[row])
            self.longest = max(self.longest, tokens)
        for row, problem in batch.problems.items():
            self.problems[lines[row]] = problem
        self.longest = max(self.longest, int(batch.lengths.max(initial=0)))
        self.batches.append(batch)
        self.lines.append(np.array(lines, dtype=np.int32)[batch.kept])

    def block(self, source: Block, roles: frozenset[str], tags: frozenset[str]) -> EncodedBlock:
        ids = _joined([batch.ids for batch in self.batches], np.int32)
        lengths = _joined([batch.lengths for batch in self.batches], np.int64)
        return EncodedBlock(
            file=source.file,
            read=self.read,
            ids=ids,
            trained=_joined([batch.trained for batch in self.batches], np.uint8),
            lengths=lengths,
            lines=_joined(self.lines, np.int32),
            hashes=row_hashes(ids, lengths),
            longest=self.longest,
            problems=tuple((line, self.problems[line], source.raw(line)) for line in sorted(self.problems)),
            dropped=tuple(self.dropped),
            cut=tuple(self.cut),
            roles=roles,
            tags=tags,
        )


def _joined(parts: list[npt.NDArray[Any]], kind: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)


def row_hashes(ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A hash (rows,) of each row's tokens, the same on every machine of one byte order."""
    data = ids.view(np.uint8).data
    ends = 4 * np.cumsum(lengths)  # bytes
    spans = zip((ends - 4 * lengths).tolist(), ends.tolist(), strict=True)
    digests = [blake2b(data[start:end], digest_size=8).digest() for start, end in spans]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def checked(answer: EncodedBlock | Failure, block: Block, file_name: Callable[[int], str]) -> EncodedBlock:
    """The encoded block. Raises what a Failure says, with the file and line."""
    if isinstance(answer, EncodedBlock):
        return answer
    where = "" if answer.line is None else f"{file_name(block.file)}:{answer.line}: "
    raise answer.kind(where + answer.message)
