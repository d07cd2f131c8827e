"""SHA-256 of a file whose chunks are there in any order."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable

Point = tuple[int, str]
"""So many bytes from the file's beginning on, and their SHA-256 (hex)."""


class OrderedHash:
    """Hashes a file front to back while its chunks arrive out of order.

    The thread that brings the chunk whose turn it is hashes it out of its own memory, and then what follows and is
    there already, read back from the page cache. The others never wait: hashing overlaps with the transfer, and costs
    no memory.
    """

    def __init__(self, handle: int, note: Callable[[int, str], None] | None = None) -> None:
        """`handle`: the open file that holds the chunks which were reported before their turn. `note` is told after
        each chunk how many bytes are hashed, and their SHA-256."""
        self._handle, self._note = handle, note
        self._digest = hashlib.sha256()
        self._position = 0  # bytes hashed
        self._there: dict[int, int] = {}  # start → bytes of chunks that wait for their turn
        self._turn = threading.Lock()  # held by the thread that hashes

    def add(self, start: int, data: memoryview) -> None:
        """The chunk at byte `start` lies in the file, and still in `data`, which is scratch memory from here on."""
        self._there[start] = len(data)
        mine = start
        while self._position in self._there and self._turn.acquire(blocking=False):
            try:
                self._advance(data, mine)
            finally:
                self._turn.release()
            mine = -1  # `data` may hold another chunk by now

    def resume(self, points: Iterable[Point], scratch: memoryview) -> int:
        """Hashes what an earlier process left, as far as it is what that process hashed: up to the last of these points
        before one that does not match. Returns the bytes that can be trusted."""
        for position, expected in points:
            ahead = self._digest.copy()
            self._from_file(ahead, self._position, position, scratch)
            if ahead.hexdigest() != expected:
                break
            self._digest, self._position = ahead, position
        return self._position

    def hexdigest(self, size: int, scratch: memoryview) -> str:
        """The hash once all `size` bytes are there; ends what is left to hash."""
        with self._turn:
            self._advance(scratch, -1)
        if self._position != size:
            raise AssertionError(f"{self._position} of {size} bytes were hashed")
        return self._digest.hexdigest()

    def _advance(self, data: memoryview, mine: int) -> None:
        while (length := self._there.pop(self._position, None)) is not None:
            if self._position == mine:
                self._digest.update(data)
            else:
                self._from_file(self._digest, self._position, self._position + length, data)
            mine = -1
            self._position += length
            if self._note is not None:
                self._note(self._position, self._digest.copy().hexdigest())

    def _from_file(self, digest: hashlib._Hash, position: int, end: int, scratch: memoryview) -> None:
        while position < end:
            room = scratch[: end - position]
            read = os.preadv(self._handle, [room], position)
            if read == 0:
                raise OSError(f"the file ends at byte {position}, before {end}: somebody cut it")
            digest.update(room[:read])
            position += read
