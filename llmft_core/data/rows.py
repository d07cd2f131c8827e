"""Bytes → rows: a line as a JSON object, and what is wrong with it or with a row of a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from llmft_core.values import RowProblem

Row = dict[str, Any] | RowProblem

NUL = "holds the character NUL (\\u0000)"
SURROGATE = "holds half of a surrogate pair (\\ud800…)"

# what Python's reader says → what to do about it
_MENDED = {
    "Unterminated string starting at": "this string has no closing quote",
    "Expecting ',' delimiter": 'a comma is missing here, or a quote in the text before is not written \\"',
    "Expecting ':' delimiter": "a colon is missing here",
    "Expecting value": "a value is missing here",
    "Expecting property name enclosed in double quotes": "a key in double quotes is missing here",
    "Illegal trailing comma before end of object": "this comma is one too many",
    "Illegal trailing comma before end of array": "this comma is one too many",
    "Invalid control character at": "a control character in a text must be escaped; a tab is \\t",
    "Extra data": "something follows the object",
}


def row_digest(rows: Iterable[dict[str, Any]]) -> str:
    """SHA-256 of rows as JSON, a line each."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(canonical(row) + b"\n")
    return hasher.hexdigest()


def canonical(row: dict[str, Any]) -> bytes:
    """A row as JSON: equal for equal rows, however they were written."""
    return json.dumps(row, sort_keys=True, default=repr).encode()


def parse_json_row(line: bytes) -> Row:
    """One line as a JSON object, or what is wrong with it (a field where one is to blame)."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowProblem("", f"is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}")
    if "\0" in text:
        column = text.index("\0") + 1
        return RowProblem("", f"holds NUL bytes: the file is damaged, or not UTF-8 (column {column})")
    if text.strip() in ("[", "{"):
        return RowProblem("", "is not valid JSON: a row is one line, and this one does not end in its line (column 1)")
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return RowProblem("", f"is not valid JSON: {_MENDED.get(error.msg, error.msg)} (column {error.colno})")
    except _GivenTwice:
        return RowProblem(_given_twice(text), "is given twice")
    except _NoNumber as error:
        return RowProblem("", f"is not valid JSON: {error} is no JSON number")
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        return RowProblem("", f"is not usable JSON: {error}")
    if not isinstance(row, dict):
        return RowProblem("", f"is a JSON {_json_type(row)}, not an object ({{…}})")
    if "\\ud" in text or "\\uD" in text or "\\u0000" in text:
        return checked(row)
    return row


def checked(row: dict[str, Any]) -> Row:
    """The row, or where in it a text is that no tokenizer takes. Half of a `\\ud83d\\ude00` pair is valid JSON but no
    character."""
    for path, text in _texts("", row):
        if "\0" in text:
            return RowProblem(path, NUL)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return RowProblem(path.encode("utf-8", "backslashreplace").decode(), SURROGATE)
    return row


def _texts(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every string in a value, keys too, with its path: `messages[2].content`."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            inner = f"{path}.{key}" if path else str(key)
            if isinstance(key, str):
                yield inner.replace("\0", "\\u0000"), key
            yield from _texts(inner, item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _texts(f"{path}[{number}]", item)


class _GivenTwice(ValueError):
    """An object with two equal keys: Python's reader would keep the last one."""


class _NoNumber(ValueError):
    """NaN or Infinity: Python's reader takes them."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _GivenTwice
    return row


class _Pairs(list[tuple[str, Any]]):
    """An object as its pairs."""


def _given_twice(text: str) -> str:
    """The path of the first key that its object has twice."""

    def find(path: str, value: Any) -> str | None:
        if isinstance(value, _Pairs):
            seen = set()
            for key, item in value:
                inner = f"{path}.{key}" if path else key
                if key in seen:
                    return inner
                seen.add(key)
                found = find(inner, item)
                if found is not None:
                    return found
        elif isinstance(value, list):
            for number, item in enumerate(value):
                found = find(f"{path}[{number}]", item)
                if found is not None:
                    return found
        return None

    path = find("", json.loads(text, object_pairs_hook=_Pairs)) or ""
    return path.encode("utf-8", "backslashreplace").decode()


def _no_constant(name: str) -> Any:
    raise _NoNumber(name)


def _json_type(value: Any) -> str:
    names = {"list": "array", "str": "string", "bool": "boolean", "NoneType": "null"}
    return names.get(type(value).__name__, "number")
