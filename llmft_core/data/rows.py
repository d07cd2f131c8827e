"""Bytes → rows: JSON lines and parquet tables, with line numbers, and what is wrong with a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from llmft_core.values import RowProblem

Row = dict[str, Any] | RowProblem

CHUNK = 1 << 20  # bytes
BOM = b"\xef\xbb\xbf"


def digest_of(file: IO[bytes]) -> str:
    """SHA-256 of the rest of a file, in hexadecimal."""
    hasher = hashlib.sha256()
    while chunk := file.read(CHUNK):
        hasher.update(chunk)
    return hasher.hexdigest()


def row_digest(rows: Iterable[dict[str, Any]]) -> str:
    """SHA-256 of rows as JSON, a line each."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return hasher.hexdigest()


def jsonl_rows(file: IO[bytes], digest: str = "") -> Iterator[tuple[int, Row]]:
    """(line from 1, row) for every line that is not blank. Raises OSError at the end where the bytes were not those
    of `digest`: rows are cached under it, so they must be its rows."""
    hasher = hashlib.sha256()
    for number, line in enumerate(_lines(file, hasher), start=1):
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield number, parse_json_row(text)
    if digest and hasher.hexdigest() != digest:
        raise OSError("it was changed while it was read; try again")


def _lines(file: IO[bytes], hasher: Any) -> Iterator[bytes]:
    """Split at newlines only, as `wc -l` and editors count them, whatever kind of file object a store returns."""
    rest = b""
    while chunk := file.read(CHUNK):
        hasher.update(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def parquet_rows(file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    """(row from 1, row). Raises pyarrow's errors (ValueError, OSError) where it is no parquet file."""
    from pyarrow import parquet

    number = 0
    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row


class _RefusedError(ValueError):
    """What Python's JSON reader accepts and we do not."""


def parse_json_row(line: bytes) -> Row:
    """One line as a JSON object, or what is wrong with it (a field where one is to blame)."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowProblem("", f"is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}")
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return RowProblem("", f"is not valid JSON: {error.msg} (column {error.colno})")
    except _RefusedError as error:
        field, reason = error.args
        return RowProblem(field, reason)
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        return RowProblem("", f"is not usable JSON: {error}")
    if not isinstance(row, dict):
        return RowProblem("", f"is a JSON {_json_type(row)}, not an object ({{…}})")
    if "\\ud" in text or "\\uD" in text:
        return _without_lone_surrogates(row)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise _RefusedError(twice, "is given twice")
    return row


def _no_constant(name: str) -> Any:
    raise _RefusedError("", f"is not valid JSON: {name} is no JSON number")


def _json_type(value: Any) -> str:
    names = {"list": "array", "str": "string", "bool": "boolean", "NoneType": "null"}
    return names.get(type(value).__name__, "number")


def _without_lone_surrogates(row: dict[str, Any]) -> Row:
    """Half of a `\\ud83d\\ude00` pair is valid JSON but no character: no tokenizer takes it."""
    for field, value in row.items():
        try:
            json.dumps([field, value], ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return RowProblem(field.encode("utf-8", "replace").decode(), "holds half of a surrogate pair (\\ud800…)")
    return row
