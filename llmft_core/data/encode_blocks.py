"""Blocks of rows → arrays of tokens: what worker processes do, and what this process does itself with small data."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmft_core.data.blocks import Block
from llmft_core.data.checks import parsed_rows
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
    bom: bool
    read: int  # rows that are not blank
    ids: npt.NDArray[np.int32]  # (tokens,)
    trained: npt.NDArray[np.uint8]  # (tokens,)
    lengths: npt.NDArray[np.int64]  # (kept rows,), tokens
    lines: npt.NDArray[np.int32]  # (kept rows,)
    parsed_lines: npt.NDArray[np.int32]  # (conversations,), also of those that cannot be used or are too long
    hashes: npt.NDArray[np.uint64]  # (conversations,), of their rows
    longest: int  # tokens of the longest row before any was dropped or cut
    problems: tuple[tuple[int, RowProblem, bytes], ...]  # line, what is wrong, the row as it lies in the file
    dropped: tuple[int, ...]  # lines of rows longer than the context
    cut: tuple[int, ...]  # lines of rows shortened to the context
    roles: frozenset[str]  # of all messages


@dataclass(frozen=True)
class Failure:
    """Why a block could not be encoded: a fault of no row."""

    message: str
    kind: type[LlmftError] = LlmftError


class BlockEncoder:
    """Encodes blocks in this process."""

    def __init__(self, work: Work) -> None:
        self._dataset = work.dataset
        self._encoder = Encoder(work.recipe)

    def answer(self, block: Block, file: str) -> EncodedBlock | Failure:
        """The encoded block; `file` is the name of its file. Whatever goes wrong is a Failure, so that it reaches the
        driver as one line."""
        try:
            return self._encode(block, file)
        except LlmftError as error:
            return Failure(str(error), InputError if isinstance(error, InputError) else LlmftError)
        except Exception as error:  # noqa: BLE001  raised by the driver
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            return Failure(f"{span(block, file)}: {type(error).__name__} at {where}: {error}")

    def _encode(self, block: Block, file: str) -> EncodedBlock:
        made = _Making()
        self._encoder.seen_roles.clear()
        waiting: list[Conversation] = []
        lines: list[int] = []
        for line, parsed, hash_ in parsed_rows(self._dataset, block, file):
            made.read += 1
            if isinstance(parsed, RowProblem):
                made.problems[line] = parsed
                continue
            waiting.append(parsed)
            lines.append(line)
            made.hashes.append(hash_)
            if len(waiting) == BATCH:
                made.add(self._encoder.encode_batch(waiting), lines)
                waiting, lines = [], []
        if waiting:
            made.add(self._encoder.encode_batch(waiting), lines)
        return made.block(block, frozenset(self._encoder.seen_roles))


@dataclass
class _Making:
    """An encoded block, batch by batch."""

    read: int = 0
    longest: int = 0
    problems: dict[int, RowProblem] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    batches: list[EncodedBatch] = field(default_factory=list)
    kept_lines: list[npt.NDArray[np.int32]] = field(default_factory=list)
    parsed_lines: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

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
        self.kept_lines.append(np.array(lines, dtype=np.int32)[batch.kept])
        self.parsed_lines += lines

    def block(self, source: Block, roles: frozenset[str]) -> EncodedBlock:
        return EncodedBlock(
            file=source.file,
            bom=source.bom,
            read=self.read,
            ids=_joined([batch.ids for batch in self.batches], np.int32),
            trained=_joined([batch.trained for batch in self.batches], np.uint8),
            lengths=_joined([batch.lengths for batch in self.batches], np.int64),
            lines=_joined(self.kept_lines, np.int32),
            parsed_lines=np.array(self.parsed_lines, dtype=np.int32),
            hashes=np.array(self.hashes, dtype=np.uint64),
            longest=self.longest,
            problems=tuple((line, self.problems[line], source.raw(line)) for line in sorted(self.problems)),
            dropped=tuple(self.dropped),
            cut=tuple(self.cut),
            roles=roles,
        )


def _joined(parts: list[npt.NDArray[Any]], kind: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)


def span(block: Block, file: str) -> str:
    """A block in messages: its file and lines."""
    return f"{file}:{block.first}-{block.first + block.count - 1}"


def checked(answer: EncodedBlock | Failure) -> EncodedBlock:
    """The encoded block. Raises what a Failure says."""
    if isinstance(answer, Failure):
        raise answer.kind(answer.message)
    return answer
