"""The checks of a row that are the same for every format, and what looks wrong in rows that can be used."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from llmft_core.data.faults import SHOWN, counted_rows
from llmft_core.data.report import Finding
from llmft_core.errors import LlmftError, close_match
from llmft_core.extensions import DatasetFormat
from llmft_core.values import Conversation, Origin, RowProblem

if TYPE_CHECKING:
    from llmft_core.data.tables import TokenTable

ROWS = 1 << 16  # rows of a table that are looked at together


class FormatFailed(LlmftError):
    """A dataset format raised an error for a row, instead of saying what is wrong with it."""


def parse_row(dataset: DatasetFormat, row: dict[str, Any]) -> Conversation | RowProblem:
    """A row as a conversation, or what is wrong with it: a key that the format does not know, what the format says, a
    trained text that is empty. Raises FormatFailed, whose message lacks the row's origin."""
    unknown = next((key for key in row if key not in dataset.keys), None) if dataset.keys else None
    if unknown is not None:
        known = ", ".join(dataset.keys)
        return RowProblem(unknown, f"is no key of {dataset.name}: it knows {known}{close_match(unknown, dataset.keys)}")
    try:
        parsed = dataset.parse(row)
    except LlmftError:
        raise
    except Exception as error:
        raise FormatFailed(
            f"dataset format {dataset.name} failed on this row ({type(error).__name__}: {error}): "
            "a format returns a RowProblem for a row it cannot use; tell its author"
        ) from error
    if isinstance(parsed, Conversation):
        if not parsed.messages:
            return RowProblem("", "holds no message")
        empty = next((one for one in parsed.messages if one.trained and not one.text.strip()), None)
        if empty is not None:
            return RowProblem(empty.role, "is trained and empty")
    return parsed


def bom_finding(file: str) -> Finding:
    """A file that begins with a byte order mark."""
    text = "a byte order mark (BOM) at the beginning is skipped; save the file as UTF-8 without one"
    return Finding(text, ((Origin(file, 1),),))


def prompt_findings(table: TokenTable) -> list[Finding]:
    """Rows of which everything is trained. Position 0 does not count: nothing predicts it."""
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


def token_findings(tokens: Iterable[str], seen: Set[str]) -> list[Finding]:
    """Tokens of the format that no row has."""
    return [Finding(f"the token {token} never occurs") for token in tokens if token not in seen]


def id_findings(tokenizer: Any, tokens: Iterable[str]) -> list[Finding]:
    """Tokens of the format that the tokenizer reads as something else than their one id: a server would too."""
    found = []
    for token in tokens:
        ids = list(tokenizer(token, add_special_tokens=False)["input_ids"])
        if ids != [tokenizer.convert_tokens_to_ids(token)]:
            found.append(Finding(f"the token {token} is no single id of this tokenizer but {len(ids)}: {ids}"))
    return found
