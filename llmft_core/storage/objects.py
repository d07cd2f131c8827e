"""One file in storage, as requests see it: what it is, and bytes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, cast

from llmft_core.errors import ChangedMeanwhile, InputError
from llmft_core.storage.faults import attempt
from llmft_core.storage.places import Place

_VERSION_KEYS = ("ETag", "etag", "generation", "LastModified", "updated", "mtime", "ino")


def version_of(told: Mapping[str, Any]) -> str:
    """What a store tells of a file's content in a listing, by the first of its marks; empty where it tells nothing."""
    marks = ("ETag", "md5Hash", "generation", "etag", "mtime")
    return next((str(told[mark]) for mark in marks if told.get(mark) is not None), "")


def modified(told: Mapping[str, Any]) -> float | None:
    """When a file was last written, in seconds since 1970 by the clock of its store; None where it tells nothing."""
    for mark in ("LastModified", "mtime"):  # S3; Google and folders
        when = told.get(mark)
        if isinstance(when, datetime):
            return when.timestamp()
        if isinstance(when, (int, float)):
            return float(when)
    return None


def info(place: Place, ask: Callable[..., Any] = attempt) -> dict[str, Any]:
    """What the store says of a file now. InputError where it is a folder or not there."""

    def look() -> dict[str, Any]:
        place.fs.invalidate_cache()
        found = cast(dict[str, Any], place.fs.info(place.path))
        if found["type"] == "directory":
            raise InputError(f"{place.uri} is a folder, not a file")
        return found

    return cast(dict[str, Any], ask(place, look))


def fetch(place: Place, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, all of them, in one request. Raises the store's own errors, and ConnectionError
    where fewer come."""
    block = cast(bytes, place.fs.cat_file(place.path, start=start, end=end))
    if len(block) != end - start:
        raise ConnectionError(f"{len(block)} bytes came where {end - start} were asked for, from byte {start}")
    return block


def store(place: Place, data: bytes) -> None:
    """Writes a whole file, over one that is there, in one request: under a checksum where the backend offers verified
    uploads. Raises the store's own errors."""
    if (writes := place.verified_uploads) is not None:
        writes.put(place.path, memoryview(data))
    else:
        place.fs.pipe_file(place.path, data)


def changed(place: Place) -> ChangedMeanwhile:
    """The error of a transfer whose source is another one by now."""
    return ChangedMeanwhile(f"{place.uri} was changed while it was downloaded: run it again once nobody writes there")


class Source:
    """A file in storage that is read in ranges: by the backend's own reads, else by those of its filesystem."""

    def __init__(self, place: Place, ask: Callable[..., Any] = attempt, told: tuple[int, str] | None = None) -> None:
        """Asks the store for size (bytes) and version, which the backend's own reads may have `told` already. Raises
        InputError where no such file is there."""
        self.place, self._ask = place, ask
        self.size: int  # bytes
        self.version: str  # empty where the store tells nothing by which a change would be seen
        self.reads = ask(place, lambda: place.ranged_reads)
        if self.reads is not None:
            reads = self.reads
            self.size, self.version = told or ask(place, lambda: reads.describe(place.path))
        else:
            self.size, self.version = self._look()

    def _look(self) -> tuple[int, str]:
        found = info(self.place, self._ask)
        told = {key: str(found[key]) for key in _VERSION_KEYS if found.get(key) is not None}
        return int(found["size"]), json.dumps(told, sort_keys=True) if told else ""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills the buffer from byte `start` on, in one request. Raises the store's own errors."""
        if self.reads is not None:
            self.reads.read_into(self.place.path, self.version, start, buffer)
        else:
            buffer[:] = fetch(self.place, start, start + len(buffer))

    def read(self, start: int, length: int) -> bytearray:
        """So many bytes from `start` on; the request is repeated where that helps."""

        def request() -> bytearray:
            buffer = bytearray(length)
            self.read_into(start, memoryview(buffer))
            return buffer

        return cast(bytearray, self._ask(self.place, request))

    def check_unchanged(self) -> None:
        """ChangedMeanwhile where the file is another one by now. The backend's own reads have looked each time."""
        if self.reads is None and (self.size, self.version) != self._look():
            raise changed(self.place)
