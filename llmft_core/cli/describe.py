"""How values and tables are put into words for a terminal, a pipe and the help of flags."""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_NAMES: dict[Any, str] = {bool: "true or false", type(None): "nothing", Any: "any value"}


def type_name(annotation: Any) -> str:
    """A type as users know it: `int`, `str`, `path`, `true or false`, `one of a, b`, `list of str`.

    That a value may be left out (`int | None`) is said by its default, not by its type.

    >>> type_name(Literal["a", "b"])
    'one of a, b'
    >>> type_name(int | None)
    'int'
    >>> type_name(list[str])
    'list of str'
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in arguments if part is not type(None))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    if isinstance(origin, type) and issubclass(origin, Sequence | set | frozenset):
        parts = [part for part in arguments if part is not Ellipsis]
        return f"list of {type_name(parts[0])}" if parts else "list"
    if annotation in _NAMES:
        return _NAMES[annotation]
    if isinstance(annotation, type):
        if issubclass(annotation, enum.Enum):
            return f"one of {', '.join(str(member.value) for member in annotation)}"
        if issubclass(annotation, Path):
            return "path"
        if issubclass(annotation, dict | BaseModel):
            return "mapping"
        return annotation.__name__
    return str(annotation)


def default_text(field: FieldInfo) -> str:
    """A field's default as one would write it on the command line; `required`, or `none` where None is the default."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, default=str)
    return str(value) if value != "" else '""'


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows to stdout and cut nothing: a folding table on a terminal, else plain aligned columns of full width."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headings, box=None, pad_edge=False, header_style="bold")
        for column in table.columns:
            column.overflow = "fold"
        for row in rows:
            table.add_row(*map(Text, row))  # as text: a bracket in an error is no markup
        Console().print(table)
    else:
        print("\n".join(aligned([headings, *rows])))


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines whose columns begin at the same place; the last column is as long as it likes.

    >>> list(aligned([["a", "bb"], ["ccc", "d"]]))
    ['a    bb', 'ccc  d']
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
