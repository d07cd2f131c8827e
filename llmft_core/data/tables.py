"""A table of token rows as memory-mapped arrays: written once, block by block; read by every worker, in slices."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from llmft_core.values import IGNORED_LABEL, Origin

# name → type of a flat array of the table
ARRAYS = {"ids": "<i4", "trained": "|u1", "offsets": "<i8", "lines": "<i4", "files": "<u2"}
CONTENT = ("ids", "trained", "offsets")
"""The arrays that say what is trained; the others say where it came from."""
MOST_FILES = 2**16
"""Files of a split, at most."""
COPIED = 1 << 16  # rows that are copied from a table to another at once


class TokenTable:
    """The rows of one split. `ids` and `trained` (tokens,) are all rows behind one another, row i is
    [offsets[i], offsets[i + 1]); `offsets` is (rows + 1,); `lines` and `files` (rows,) say where each row came from.

    All arrays are mapped, none is read before it is asked for."""

    def __init__(self, folder: Path, sources: Sequence[str] = ()) -> None:
        """Maps the arrays of a folder; `sources` are the names of the files that `files` counts. Raises OSError or
        ValueError where an array is missing, cut off, or does not fit the others."""
        self.folder = folder
        self.sources = tuple(sources)
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        for name, kind in ARRAYS.items():
            if arrays[name].dtype != np.dtype(kind) or arrays[name].ndim != 1:
                raise ValueError(f"{name}.npy is not an array of {kind}")
        self.ids: npt.NDArray[np.int32] = arrays["ids"]
        self.trained: npt.NDArray[np.uint8] = arrays["trained"]
        self.offsets: npt.NDArray[np.int64] = arrays["offsets"]
        self.lines: npt.NDArray[np.int32] = arrays["lines"]
        self.files: npt.NDArray[np.uint16] = arrays["files"]
        whole = len(self.offsets) > 0 and int(self.offsets[-1]) == len(self.ids) == len(self.trained)
        if not whole or not len(self.offsets) - 1 == len(self.lines) == len(self.files):
            raise ValueError(f"the arrays of {folder.name} are not of one table")

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
        return Origin(self.sources[int(self.files[index])], int(self.lines[index]))

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

    def digest(self) -> str:
        """SHA-256 (hex) of the tokens and labels, read from the disk."""
        return _content_digest({name: hashlib.sha256(getattr(self, name)).hexdigest() for name in CONTENT})

    def _span(self, index: int) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)} rows")
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def _content_digest(by_array: dict[str, str]) -> str:
    return hashlib.sha256(" ".join(by_array[name] for name in CONTENT).encode()).hexdigest()


class TableWriter:
    """Appends rows to the arrays of a new table. No row is kept in memory."""

    def __init__(self, files: dict[str, IO[bytes]]) -> None:
        self._files = files
        self._counts = dict.fromkeys(ARRAYS, 0)
        self._hashers = {name: hashlib.sha256() for name in CONTENT}
        for name in ARRAYS:
            self._write_header(name)
        self._write("offsets", np.zeros(1, dtype=np.int64))

    @property
    def rows(self) -> int:
        """Rows written so far."""
        return self._counts["lines"]

    def append_rows(
        self,
        ids: npt.NDArray[np.int32],
        trained: npt.NDArray[Any],
        lengths: npt.NDArray[np.int64],
        lines: npt.NDArray[np.int32],
        files: npt.NDArray[Any],
    ) -> None:
        """Rows behind one another: `ids` and `trained` are (tokens,), the others (rows,)."""
        self._write("offsets", self._counts["ids"] + np.cumsum(lengths))
        self._write("ids", ids)
        self._write("trained", trained)
        self._write("lines", lines)
        self._write("files", files)

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, dtype=ARRAYS[name]).data
        self._files[name].write(data)
        if name in self._hashers:
            self._hashers[name].update(data)
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

    def digest(self) -> str:
        """SHA-256 (hex) of the tokens and labels written so far, as `TokenTable.digest` reads them."""
        return _content_digest({name: hasher.hexdigest() for name, hasher in self._hashers.items()})


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


def write_selection(table: TokenTable, rows: npt.NDArray[np.int64], folder: Path) -> str:
    """A new table of some rows of another, in the order given; its digest."""
    with writing(folder) as writer:
        for start in range(0, len(rows), COPIED):
            chosen = rows[start : start + COPIED]
            begins, lengths = table.offsets[chosen], table.offsets[chosen + 1] - table.offsets[chosen]
            ends = np.cumsum(lengths)
            there = np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1])
            writer.append_rows(
                table.ids[there], table.trained[there], lengths, table.lines[chosen], table.files[chosen]
            )
    return writer.digest()
