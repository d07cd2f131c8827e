"""Blocks: consecutive rows of one file, small enough to be sent to a process, and not parsed before they are there."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

from llmft_core.data.rows import Row, checked, parse_json_row
from llmft_core.values import RowProblem

BLOCK = 1 << 20
"""Bytes of a block, about: whole rows, so the last one may reach beyond."""
TABLE_ROWS = 1024  # rows read from a table at once
LONGEST_LINE = 64 << 20  # bytes
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block(ABC):
    """Rows of the file with index `file` among its split's; the first one has the number `first`, counted from 1. It
    pickles."""

    file: int
    first: int

    @property
    @abstractmethod
    def count(self) -> int:
        """Rows or lines in it, blank ones too: the next block of the file begins at `first + count`."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[int, Row]]:
        """(number, row) of every row that is not blank; what is no row is a RowProblem."""

    @abstractmethod
    def raw(self, number: int) -> bytes:
        """The bytes of a row as they lie in the file; as JSON where the file has no lines."""

    @property
    def bom(self) -> bool:
        """Whether it begins with a byte order mark, which is skipped."""
        return False


@dataclass(frozen=True)
class LinesBlock(Block):
    """Whole lines of text."""

    data: bytes

    @cached_property
    def _lines(self) -> list[bytes]:
        lines = self.data.split(b"\n")
        return lines if lines[-1] else lines[:-1]

    @property
    def count(self) -> int:
        """Lines as `wc -l` counts them, and a last one without an end."""
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))

    @property
    def bom(self) -> bool:
        """Whether it begins with a byte order mark, which is skipped."""
        return self.first == 1 and self.data.startswith(BOM)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(line, row) of every line that is not blank."""
        bom = self.bom
        for number, line in enumerate(self._lines, start=self.first):
            text = line.removeprefix(BOM) if bom and number == 1 else line
            if text.strip():
                yield number, parse_json_row(text)

    def raw(self, number: int) -> bytes:
        """The line without its end."""
        return self._lines[number - self.first]


@dataclass(frozen=True)
class TableBlock(Block):
    """Rows of a table, as an Arrow stream."""

    rows_in_it: int
    data: bytes

    @property
    def count(self) -> int:
        """Rows."""
        return self.rows_in_it

    @cached_property
    def _table(self) -> Any:
        from pyarrow import ipc

        return ipc.open_stream(self.data).read_all()

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(row, values by column)."""
        try:
            rows = self._table.to_pylist()
        except UnicodeDecodeError:
            rows = [self._row(index) for index in range(self.count)]
        for number, row in enumerate(rows, start=self.first):
            yield number, row if isinstance(row, RowProblem) else checked(row)

    def _row(self, index: int) -> Row:
        """One row, where a text of the block is not UTF-8."""
        row: dict[str, Any] = {}
        for name, column in zip(self._table.column_names, self._table.columns, strict=True):
            try:
                row[name] = column[index].as_py()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                return RowProblem(name, f"is not UTF-8: byte 0x{byte:02x} at position {error.start + 1}")
        return row

    def raw(self, number: int) -> bytes:
        """The row as JSON."""
        row = self._row(number - self.first)
        return b"" if isinstance(row, RowProblem) else as_json(row)


@dataclass(frozen=True)
class MadeBlock(Block):
    """Rows that a format made up."""

    made: tuple[dict[str, Any], ...]

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.made)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(number, row)."""
        for number, row in enumerate(self.made, start=self.first):
            yield number, checked(row)

    def raw(self, number: int) -> bytes:
        """The row as JSON."""
        return as_json(self.made[number - self.first])


def as_json(row: dict[str, Any]) -> bytes:
    """A row that has no line of its own, as one."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")


class TooLongLine(ValueError):
    """A line that is no row: line number."""


def cut_lines(file: int, stream: IO[bytes]) -> Iterator[LinesBlock]:
    """The stream's lines in blocks, split at newlines only, as `wc -l` and editors count them. Raises TooLongLine."""
    line = 1
    waiting: list[bytes] = []  # the beginning of a line that has no end yet
    size = 0  # bytes of it
    while chunk := stream.read(BLOCK):
        end = chunk.rfind(b"\n") + 1
        if end:
            block = LinesBlock(file, line, b"".join([*waiting, chunk[:end]]))
            line += block.count
            yield block
            waiting, size = [], 0
        waiting.append(chunk[end:])
        size += len(chunk) - end
        if size > LONGEST_LINE:
            raise TooLongLine(line)
    if size:
        yield LinesBlock(file, line, b"".join(waiting))


def cut_table(file: int, stream: IO[bytes]) -> Iterator[TableBlock]:
    """The rows of a parquet file in blocks. Raises pyarrow's errors (ValueError, OSError) where it is none, and
    ValueError where two columns have one name."""
    import pyarrow as pa
    from pyarrow import parquet

    first = 1
    with parquet.ParquetFile(stream) as table:
        names = table.schema_arrow.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"it has two columns called {twice}")
        for batch in table.iter_batches(batch_size=TABLE_ROWS):
            for part in _parts(batch):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
                yield TableBlock(file, first, part.num_rows, sink.getvalue().to_pybytes())
                first += part.num_rows


def _parts(batch: Any) -> Iterator[Any]:
    """A batch of long rows as several."""
    rows = max(1, batch.num_rows * BLOCK // max(1, batch.nbytes))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def cut_made(file: int, rows: Iterator[dict[str, Any]]) -> Iterator[MadeBlock]:
    """Made-up rows in blocks of as many as a table's."""
    first = 1
    waiting: list[dict[str, Any]] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == TABLE_ROWS:
            yield MadeBlock(file, first, tuple(waiting))
            first += len(waiting)
            waiting = []
    if waiting:
        yield MadeBlock(file, first, tuple(waiting))
