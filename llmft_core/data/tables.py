"""A table of token rows as memory-mapped arrays: written once, row by row; read by every worker, in slices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from llmft_core.values import IGNORED_LABEL, EncodedExample, Origin

# name → type of a flat array of the table
ARRAYS = {"ids": "<i4", "trained": "|u1", "offsets": "<i8", "lines": "<i4"}


class TokenTable:
    """The rows of one split. `ids` and `trained` (tokens,) are all rows behind one another, row i is
    [offsets[i], offsets[i + 1]); `offsets` is (rows + 1,), `lines` (rows,) the line each row came from."""

    def __init__(self, folder: Path, source: str = "") -> None:
        """Maps the arrays of a folder; `source` is the file that `lines` are lines of. Raises OSError where one is
        missing."""
        self.folder = folder
        self.source = source
        self.ids: npt.NDArray[np.int32] = np.load(folder / "ids.npy", mmap_mode="r")
        self.trained: npt.NDArray[np.uint8] = np.load(folder / "trained.npy", mmap_mode="r")
        self.offsets: npt.NDArray[np.int64] = np.load(folder / "offsets.npy", mmap_mode="r")
        self.lines: npt.NDArray[np.int32] = np.load(folder / "lines.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """(ids, labels), each (T,): the ids as a read-only view, the labels with −100 where not trained."""
        span = self._span(index)
        ids = self.ids[span]
        return ids, np.where(self.trained[span], ids, IGNORED_LABEL).astype(np.int64)

    def length(self, index: int) -> int:
        """Tokens of a row."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def trained_tokens(self, index: int) -> int:
        """Labels of a row that count after the shift: position 0 is predicted by nothing."""
        span = self._span(index)
        return int(np.count_nonzero(self.trained[span.start + 1 : span.stop]))

    def origin(self, index: int) -> Origin:
        """The file and line of a row."""
        return Origin(self.source, int(self.lines[index]))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens (rows,) of each row."""
        return np.diff(self.offsets).astype(np.int32)

    @cached_property
    def trained_counts(self) -> npt.NDArray[np.int32]:
        """`trained_tokens` (rows,) of each row."""
        starts = self.offsets[:-1]  # no row is empty
        counts: npt.NDArray[np.int32] = np.add.reduceat(self.trained, starts, dtype=np.int32)
        counts -= self.trained[starts]
        return counts

    @cached_property
    def total_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.offsets[-1])

    @cached_property
    def total_trained_tokens(self) -> int:
        """`trained_tokens` of all rows."""
        return int(np.count_nonzero(self.trained)) - int(np.count_nonzero(self.trained[self.offsets[:-1]]))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.diff(self.offsets).max())

    @cached_property
    def ends_trained(self) -> float:
        """Share of the rows whose last token is trained: the model sees them end."""
        return float(np.count_nonzero(self.trained[self.offsets[1:] - 1])) / len(self)

    def _span(self, index: int) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)} rows")
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


class TableWriter:
    """Appends rows to the arrays of a new table. No row is kept in memory."""

    def __init__(self, files: dict[str, IO[bytes]]) -> None:
        self._files = files
        self._counts = dict.fromkeys(ARRAYS, 0)
        for name in ARRAYS:
            self._write_header(name)
        self._write("offsets", np.zeros(1, dtype=np.int64))

    @property
    def rows(self) -> int:
        """Rows written so far."""
        return self._counts["lines"]

    def append(self, example: EncodedExample, line: int) -> None:
        """One encoded row and the line it came from."""
        labels = np.asarray(example.labels, dtype=np.int64)
        self.append_arrays(np.asarray(example.input_ids, dtype=np.int32), labels != IGNORED_LABEL, line)

    def append_arrays(self, ids: npt.NDArray[np.int32], trained: npt.NDArray[Any], line: int) -> None:
        """`ids` and `trained` are (T,)."""
        self._write("ids", ids)
        self._write("trained", trained)
        self._write("offsets", np.array([self._counts["ids"]]))
        self._write("lines", np.array([line]))

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        self._files[name].write(values.astype(ARRAYS[name]).tobytes())
        self._counts[name] += len(values)

    def _write_header(self, name: str) -> None:
        # numpy pads its header so that a growing first axis still fits: written again at the end, in place.
        header = {"descr": ARRAYS[name], "fortran_order": False, "shape": (self._counts[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], header)

    def finish(self) -> None:
        """Write the final lengths and bring everything to the disk."""
        for name, file in self._files.items():
            begins = file.tell() - self._counts[name] * np.dtype(ARRAYS[name]).itemsize
            file.seek(0)
            self._write_header(name)
            if file.tell() != begins:
                raise RuntimeError(f"the header of {name}.npy grew from {begins} to {file.tell()} bytes")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def writing(folder: Path) -> Iterator[TableWriter]:
    """A new table in `folder`, which is made; complete when the block ends without an error."""
    folder.mkdir(parents=True)
    files: dict[str, IO[bytes]] = {}
    try:
        for name in ARRAYS:
            files[name] = (folder / f"{name}.npy").open("wb")
        writer = TableWriter(files)
        yield writer
        writer.finish()
    finally:
        for file in files.values():
            file.close()


def write_selection(table: TokenTable, rows: Sequence[int], folder: Path) -> None:
    """A new table of some rows of another, in the order given."""
    with writing(folder) as writer:
        for row in rows:
            span = table._span(row)
            writer.append_arrays(table.ids[span], table.trained[span], int(table.lines[row]))
