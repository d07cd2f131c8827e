"""Files to and from storage: what callers use. The bytes are moved by `downloads` and `uploads` on the `engine`.

Every function raises LlmftError with one line; InputError where the user has to change something (a name, a key).
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmft_core.errors import InputError
from llmft_core.storage.downloads import Exchange, download_files
from llmft_core.storage.engine import STANDARD_BUDGET, Budget, FileDone, Progress
from llmft_core.storage.faults import attempt
from llmft_core.storage.objects import fetch, info, modified, store, version_of
from llmft_core.storage.places import Place, checked_name
from llmft_core.storage.uploads import upload_files

BLOCK = 16 * 2**20  # bytes of one ranged read
READ_AHEAD = 2**20  # bytes that an opened file reads at once


def list_files(place: Place) -> dict[str, int]:
    """All files below a folder: relative path → bytes, as they are now; {} where there is no such folder."""
    return {name: size for name, (size, _) in list_versions(place).items()}


def list_versions(place: Place) -> dict[str, tuple[int, str]]:
    """As `list_files`: relative path → (bytes, version). The version is another one after a change of the content (the
    store's checksum or generation, a local file's time), and empty where the store lists none."""
    return {name: (int(told["size"]), version_of(told)) for name, told in _listing(place).items()}


def last_written(place: Place) -> float | None:
    """When the youngest file of a folder was written, in seconds since 1970 by the store's clock; None where the store
    does not list it of every file, or there is none."""
    times = [modified(told) for told in _listing(place).values()]
    known = [when for when in times if when is not None]
    return max(known) if known and len(known) == len(times) else None


def _listing(place: Place) -> dict[str, dict[str, Any]]:
    """All files below a folder: relative path → what the store tells of it."""
    fs = attempt(place, lambda: place.fs)
    # fsspec's generic walk leaves out folders that it cannot read; the object stores' flat listing does not.
    strict = {} if fs.async_impl else {"on_error": "raise"}

    def listing() -> dict[str, Any]:
        fs.invalidate_cache()
        try:
            return cast(dict[str, Any], fs.find(place.path, detail=True, **strict))
        except FileNotFoundError:
            if fs.async_impl or fs.exists(place.path):  # a missing bucket, or a folder that went while it was walked
                raise
            return {}

    prefix = place.path.rstrip("/") + "/"
    found = attempt(place, listing)
    files = {
        path.removeprefix(prefix): told
        for path, told in found.items()
        if path.startswith(prefix) and path != prefix and not path.endswith("/")
    }
    for name in files:
        checked_name(name)  # an object may be called `../x`; nobody joins such a name to a local folder
    return dict(sorted(files.items()))


def list_names(place: Place) -> list[str]:
    """What lies directly in a folder, folders with a slash at their end; [] where there is no such folder."""

    def listing() -> list[dict[str, Any]] | None:
        place.fs.invalidate_cache()
        try:
            return cast(list[dict[str, Any]], place.fs.ls(place.path, detail=True))
        except FileNotFoundError:
            return None

    found = attempt(place, listing)
    if found is None:
        return list(list_files(place))  # none; or the bucket is missing, and then this says so
    prefix = place.path.rstrip("/") + "/"
    below = [(entry["name"].rstrip("/"), entry["type"] == "directory") for entry in found]
    return sorted(path.removeprefix(prefix) + "/" * folder for path, folder in below if path.startswith(prefix))


def exists(place: Place) -> bool:
    """Whether a file or folder is there."""

    def look() -> bool:
        place.fs.invalidate_cache()
        try:
            place.fs.info(place.path)
        except FileNotFoundError:
            return False
        return True

    return attempt(place, look)


def read_bytes(place: Place, limit: int | None = None) -> bytes:
    """A file's content, or its first `limit` bytes."""
    size = info(place)["size"]
    return b"".join(_blocks(place, size if limit is None else min(size, limit)))


def write_bytes(place: Place, data: bytes) -> None:
    """Writes a small file, over one that is there; under a checksum where the backend offers verified uploads."""
    attempt(place, lambda: store(place, data))


def open_read(place: Place) -> BinaryIO:
    """A seekable binary file over ranged reads; its errors are one line too, and passing faults are repeated."""
    return cast(BinaryIO, io.BufferedReader(_RangedFile(place, info(place)["size"]), READ_AHEAD))


def download(place: Place, target: Path, sha256: str | None = None) -> str:
    """Copies a file to `target`, as `download_many` does, and returns its SHA-256 (hex)."""
    return download_many([(place, target, sha256)])[0]


def download_many(
    files: Sequence[tuple[Place, Path, str | None]],
    *,
    budget: Budget = STANDARD_BUDGET,
    deadline: float | None = None,
    progress: Progress | None = None,
    done: FileDone | None = None,
    exchange: Exchange | None = None,
) -> list[str]:
    """Copies files to local paths, whose folders are made where needed; returns their SHA-256 (hex) in the same order.

    Each file is compared with its expected SHA-256 where one is given, and appears at its path whole or not at all:
    until then it grows as `.NAME.part` beside it. A large one that is interrupted stays there with its journal, and is
    continued by the next download of the same file to the same path, in another process too. After a full disk, a
    wrong hash or a change at the source nothing stays. `deadline`: seconds for all (default: 2 minutes, and a second
    for each MiB). Raises LlmftError for the first file that fails, once the requests in flight have ended; `done` has
    been called by then with each file that is complete. `exchange`: other nodes that fetch the same files now.
    """
    return download_files(files, lambda path: free_bytes(path), budget, deadline, progress, done, exchange)


def upload(source: Path, place: Place) -> str:
    """Copies a local file to storage, as `upload_many` does, and returns its SHA-256 (hex)."""
    return upload_many([(source, place)])[0]


def upload_many(
    files: Sequence[tuple[Path, Place]],
    *,
    budget: Budget = STANDARD_BUDGET,
    deadline: float | None = None,
    progress: Progress | None = None,
    done: FileDone | None = None,
) -> list[str]:
    """Copies local files to storage; returns their SHA-256 (hex) in the same order.

    What lies there then is what was sent: where the backend offers verified uploads, the store has checked every part
    (and an interrupted upload in parts is continued, by another process too); else its own MD5 of the file is compared,
    or the file is read back. `deadline` and `done` as for `download_many`. Raises LlmftError for the first file that
    fails, InputError for one that cannot be read.
    """
    return upload_files(files, budget, deadline, progress, done)


def create(place: Place, data: bytes) -> bool:
    """Writes a small file unless one is there; False where one is. Of several writers, whose data differ, exactly one
    gets True. Raises InputError where the backend cannot promise that. (Some servers with S3's protocol do not keep
    S3's promise: they ignore If-None-Match.)"""
    if not place.backend.creates_exclusively:
        raise InputError(f"{place.uri}: storage {place.backend.name} cannot create a file only where none is there")

    attempts = 0

    def write() -> bool:
        nonlocal attempts
        attempts += 1
        try:
            place.fs.pipe_file(place.path, data, mode="create")
        except FileExistsError:
            # after a repeated request it may be our own, whose answer was lost
            return attempts > 1 and bool(place.fs.cat_file(place.path) == data)
        return True

    return attempt(place, write)


def delete(place: Place) -> None:
    """Removes one file. One that is gone already is no error: a repeated request may have removed it."""

    def remove() -> None:
        try:
            place.fs.rm_file(place.path)
        except FileNotFoundError:
            return

    attempt(place, remove)


def delete_folder(place: Place) -> None:
    """Removes a folder with all that is in it. One that is gone already is no error: object stores have none."""

    def remove() -> None:
        place.fs.invalidate_cache()
        try:
            place.fs.rm(place.path, recursive=True)
        except FileNotFoundError:
            return

    attempt(place, remove)


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds `path`, which need not exist yet."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _read(place: Place, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, all of them."""
    return attempt(place, lambda: fetch(place, start, end))


def _blocks(place: Place, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, in blocks: each is one request, repeated on its own."""
    for start in range(0, size, BLOCK):
        yield _read(place, start, min(start + BLOCK, size))


class _RangedFile(io.RawIOBase):
    """A file in storage as Python's raw file: position and ranged reads."""

    def __init__(self, place: Place, size: int) -> None:
        super().__init__()
        self._place, self._size, self._position = place, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to byte {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        block = _read(self._place, self._position, end)
        buffer[: len(block)] = block
        self._position = end
        return len(block)
