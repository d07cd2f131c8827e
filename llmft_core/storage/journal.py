"""What of a half-written file can be trusted, by another process too."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import threading
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from llmft_core.storage.ordered_hash import Point

CLOSED = -1  # no file has this handle: a thread that comes too late fails instead of writing into another file

_SYNC_FILE_RANGE_WRITE = 2  # <linux/fs.h>


class Partial:
    """A file that grows in chunks beside its target: `.NAME.part`, and for large ones `.NAME.part.journal`, with the
    SHA-256 of ever longer beginnings of it.

    Nothing in the file is trusted for being there: a later process hashes it from the beginning, which it has to do
    anyway, and goes on behind the last point of the journal that it finds again. So a chunk that a power cut tore, or
    that somebody changed, is fetched again, and nothing has to be synced on the way, which would halve the rate. One
    process at a time holds the file (flock); another one takes a name of its own, without a journal. Raises OSError.
    """

    def __init__(self, target: Path, size: int, chunk: int, origin: dict[str, Any] | None) -> None:
        """`size`, `chunk` in bytes; `origin` is what the file is a copy of, in JSON's types: only the same one is
        continued, and None never."""
        self.target, self.size, self.chunk = target, size, chunk
        self.path = target.parent / f".{target.name}.part"
        held = _locked(self.path)
        if held is None:
            self.path = target.parent / f".{target.name}.{uuid.uuid4().hex}.part"
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        else:
            self.handle = held
        self._writing = threading.Lock()
        self._journal: int | None = None
        self._noted = False
        self.points: list[Point] = []  # what an earlier process noted: to be compared, then told to `trust`
        try:
            self._open_journal(origin if held is not None and size > chunk else None)
        except BaseException:
            os.close(self.handle)
            raise

    @property
    def _journal_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.journal")

    def _open_journal(self, origin: dict[str, Any] | None) -> None:
        self._header = json.dumps({**(origin or {}), "size": self.size, "chunk": self.chunk}, sort_keys=True)
        if origin is None:
            if self.path.name == f".{self.target.name}.part":
                self._journal_path.unlink(missing_ok=True)
            self._start_anew()
            return
        lines = _whole_lines(self._journal_path)
        if lines[:1] == [self._header] and os.fstat(self.handle).st_size == self.size:
            self.points = _points(lines[1:], self.size, self.chunk)
        self.trust(0 if not self.points else self.points[-1][0])

    def _start_anew(self) -> None:
        os.ftruncate(self.handle, 0)
        os.ftruncate(self.handle, self.size)

    def trust(self, length: int) -> None:
        """The first `length` bytes are what an earlier process hashed; points behind them are forgotten."""
        self.points = [point for point in self.points if point[0] <= length]
        self._noted = bool(self.points)
        if not self.points:
            self._start_anew()
        # written anew, so that nothing follows a torn line
        fresh = self._journal_path.with_name(f"{self._journal_path.name}.new")
        fresh.write_text("\n".join([self._header, *map(json.dumps, self.points), ""]), encoding="utf-8")
        os.replace(fresh, self._journal_path)
        if self._journal is not None:
            os.close(self._journal)
        self._journal = os.open(self._journal_path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def write(self, index: int, data: memoryview) -> None:
        """Puts chunk `index` in its place, and lets the disk begin with it, so that `finish` has little to wait for."""
        start, written = index * self.chunk, 0
        with self._writing:  # the kernel lets in one writer a file, and the others would wait for it in a busy loop
            while written < len(data):
                written += os.pwrite(self.handle, data[written:], start + written)
        if (begin_writeback := _begin_writeback()) is not None:
            begin_writeback(self.handle, start, len(data))

    def note(self, length: int, sha256: str) -> None:
        """The first `length` bytes are there, and this is their hash."""
        if self._journal is not None:
            os.write(self._journal, (json.dumps((length, sha256)) + "\n").encode())
            self._noted = True

    def finish(self) -> None:
        """To the disk, and under the final name."""
        os.fsync(self.handle)
        os.replace(self.path, self.target)
        if self._journal is not None:
            self._journal_path.unlink(missing_ok=True)
        self._close()

    def leave(self) -> None:
        """Ends work on it; what can be continued stays for a later process."""
        if self._journal is not None and self._noted:
            self._close()
        else:
            self.discard()

    def discard(self) -> None:
        """Ends work on it and removes it."""
        self.path.unlink(missing_ok=True)
        if self._journal is not None:
            self._journal_path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        handles = (self._journal, self.handle)
        self._journal, self.handle = None, CLOSED
        for handle in handles:
            if handle is not None:
                os.close(handle)


@cache
def _begin_writeback() -> Callable[[int, int, int], object] | None:
    """Given a handle, a start and a length (bytes): tells the disk to write them, and does not wait for it. Only
    Linux has this, and `os` does not offer it. Its errors do not count: `fsync` meets them again."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is None:
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return lambda handle, start, length: call(handle, start, length, _SYNC_FILE_RANGE_WRITE)


def _locked(path: Path) -> int | None:
    """The file, open and ours alone; None where another process has it, or the file system knows no locks."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # no locks here: nobody ever uses this file
                path.unlink(missing_ok=True)
            return None
        try:
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass  # who had it renamed or removed it between our opening and our lock: there is a new one to make
        os.close(handle)


def _whole_lines(journal: Path) -> list[str]:
    """The lines that end; a process may have died in the middle of the last one."""
    data = journal.read_bytes() if journal.exists() else b""
    return data.decode("utf-8", errors="replace").split("\n")[:-1]


def _points(lines: list[str], size: int, chunk: int) -> list[Point]:
    """The points in these lines, up to the first line that is none of ours."""
    points: list[Point] = []
    last = 0
    for line in lines:
        try:
            position, sha256 = json.loads(line)
        except (ValueError, TypeError):
            break
        whole = type(position) is int and last < position <= size and (position % chunk == 0 or position == size)
        if not whole or not isinstance(sha256, str):
            break
        points.append((position, sha256))
        last = position
    return points
