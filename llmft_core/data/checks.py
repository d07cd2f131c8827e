"""The checks of a row that are the same for every format, and what looks wrong in rows that can be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llmft_core.data.blocks import Block
from llmft_core.data.faults import SHOWN, counted_rows
from llmft_core.data.repeats import row_hash
from llmft_core.data.report import Finding
from llmft_core.errors import LlmftError, close_match
from llmft_core.extensions import DatasetFormat, Split
from llmft_core.values import Conversation, Message, Origin, RowProblem

if TYPE_CHECKING:
    from llmft_core.data.tables import TokenTable

ROWS = 1 << 16  # rows of a table that are looked at together
TOKENS = 1 << 22


def parse_row(dataset: DatasetFormat, row: dict[str, Any], origin: Origin) -> Conversation | RowProblem:
    """A row as a conversation, or what is wrong with it: a key that the format does not know, what the format says, a
    trained text that is empty. Raises LlmftError where the format itself fails."""
    unknown = next((key for key in row if key not in dataset.keys), None) if dataset.keys else None
    if unknown is not None:
        there_are = ", ".join(dataset.keys)
        return RowProblem(
            unknown, f"is no key of {dataset.name}: it knows {there_are}{close_match(unknown, dataset.keys)}"
        )
    try:
        parsed = dataset.parse(row)
    except LlmftError:
        raise
    except Exception as error:
        raise LlmftError(
            f"{origin}: dataset format {dataset.name} failed on this row ({type(error).__name__}: {error}): "
            "a format returns a RowProblem for a row it cannot use; tell its author"
        ) from error
    if isinstance(parsed, Conversation):
        if not parsed.messages:
            return RowProblem("", "holds no message")
        around = (None, *parsed.messages, None)
        for before, one, after in zip(around, parsed.messages, around[2:], strict=False):
            if one.trained and not one.text.strip() and not _goes_on(before, one) and not _goes_on(one, after):
                return RowProblem(one.role, "is trained and empty")
    return parsed


def _goes_on(one: Message | None, following: Message | None) -> bool:
    """Whether two messages are one, with a token in it that stands alone."""
    if one is None or following is None:
        return False
    return bool(one.closing) and not following.opening and one.role == following.role


def parsed_rows(
    dataset: DatasetFormat, block: Block, file: str
) -> Iterator[tuple[int, Conversation | RowProblem, int]]:
    """(line, conversation, hash of the row) of every row of a block; what is wrong with it instead of a conversation.
    `file` is the name of the block's file. Raises LlmftError where the format itself fails."""
    for line, row in block.rows():
        if isinstance(row, RowProblem):
            yield line, row, 0
        else:
            yield line, parse_row(dataset, row, Origin(file, line)), row_hash(row)


def bom_finding(file: str) -> Finding:
    """A file that begins with a byte order mark."""
    text = "a byte order mark (BOM) at the beginning is skipped; save the file as UTF-8 without one"
    return Finding(text, ((Origin(file, 1),),))


def table_findings(split: Split, table: TokenTable, tokens: Mapping[str, int], train_on: str) -> tuple[Finding, ...]:
    """What looks wrong in the rows of a split: rows of which everything is trained, unless `--data.train-on all` wants
    that; tokens of the format (text → id) that never occur."""
    found = [] if train_on == "all" else _wholly_trained(table)
    missing = dict(tokens)
    for start in range(0, len(table.ids), TOKENS):
        ids = table.ids[start : start + TOKENS]
        missing = {token: id_ for token, id_ in missing.items() if not (ids == id_).any()}
        if not missing:
            break
    found += [Finding(f"the token {token} never occurs in {split}") for token in missing]
    return tuple(found)


def _wholly_trained(table: TokenTable) -> list[Finding]:
    """Position 0 does not count: nothing predicts it."""
    count = 0
    origins: list[tuple[Origin, ...]] = []
    for start in range(0, len(table), ROWS):
        offsets = np.asarray(table.offsets[start : start + ROWS + 1])  # (rows + 1,)
        flags = np.array(table.trained[offsets[0] : offsets[-1]])
        flags[offsets[:-1] - offsets[0]] = 1
        whole = np.flatnonzero(np.minimum.reduceat(flags, offsets[:-1] - offsets[0]))
        count += len(whole)
        origins += [(table.origin(start + int(row)),) for row in whole[: SHOWN - len(origins)]]
    if not count:
        return []
    return [Finding(f"{counted_rows(count)} without a prompt: everything in it is trained", tuple(origins))]


def token_findings(tokenizer: Any, tokens: Mapping[str, int]) -> tuple[Finding, ...]:
    """Tokens of the format that this tokenizer does not read as their one id."""
    found = []
    for token, id_ in tokens.items():
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if list(ids) != [id_]:
            found.append(
                Finding(f"the token {token} is {len(ids)} ids of this tokenizer, not one: servers will not stop at it")
            )
    return tuple(found)
