"""What all formats say of a row whose fields are not what they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmft_core import RowProblem

LONGEST = 40  # characters of a key that are shown


def missing_field(row: Mapping[str, Any], fields: Sequence[str]) -> RowProblem | None:
    """The first field that is missing; None where all are there."""
    for field in fields:
        if field not in row:
            return RowProblem(field, f"is missing; the row has {', '.join(map(shown_key, row)) or 'no fields'}")
    return None


def wrong_text(value: Any, field: str) -> RowProblem | None:
    """Why a value is no text that says something; None where it is one."""
    if not isinstance(value, str):
        return RowProblem(field, f"is {type(value).__name__}, not text")
    return None if value.strip() else RowProblem(field, "is empty")


def shown_key(key: str) -> str:
    """A key in one line."""
    short = key if len(key) <= LONGEST else f"{key[:LONGEST]}…"
    return short if short.isprintable() and short else repr(short)
