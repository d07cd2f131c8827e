"""One file with rows, or one generator: opened, decompressed, hashed and cut into blocks."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from llmft_core.data.blocks import BLOCK, LONGEST_LINE, Block, TooLongLine, cut_lines, cut_made, cut_table
from llmft_core.data.hub import fetch_from_hub
from llmft_core.data.rows import row_digest
from llmft_core.errors import InputError, LlmftError
from llmft_core.extensions import DatasetFormat, Split

if TYPE_CHECKING:
    from llmft_core.storage.places import Place, Places

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""The file types that are read."""
READ_AHEAD = 8 << 20  # bytes asked of a store at once
COMPANION_LIMIT = 16 << 20  # bytes


@dataclass(frozen=True)
class FileSource:
    """A file with rows. `location` is where it is read from: a local path, or a URI; `name` is what users see in
    `file:line`; `flag` is the flag that led here; `hub` is (hub id, path in the repository) of one from the hub."""

    name: str
    location: str
    flag: str
    places: Places | None
    hub: tuple[str, str] | None = None

    def open(self) -> IO[bytes]:
        """The file's bytes as they lie. Raises InputError where it cannot be opened."""
        if is_uri(self.location):
            from llmft_core.storage.transfer import open_read

            return open_read(place_of(self.places, self.location))
        try:
            return Path(self.location).open("rb")
        except OSError as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: Exception) -> InputError:
        """A failure of the file system or of a reader in the words of the flag."""
        kind = {".gz": "gzip", ".zst": "zstd"}.get(Path(self.location).suffix)
        if kind and isinstance(error, EOFError):
            return InputError(f"{self.flag}: {self.name} is cut off: its {kind} data has no end; fetch it again")
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        if kind and isinstance(error, (zlib.error, gzip.BadGzipFile, zstd_module().ZstdError)):
            return InputError(f"{self.flag}: {self.name} is no whole {kind} file: {reason}; fetch it again")
        return InputError(f"{self.flag}: cannot read {self.name}: {reason}")

    def digest(self) -> str:
        """SHA-256 of the bytes as they lie, in hexadecimal. Raises InputError where they cannot be read."""
        with self.open() as file:
            return self._digest_of(file)

    def _digest_of(self, file: IO[bytes]) -> str:
        hasher = hashlib.sha256()
        try:
            while chunk := file.read(READ_AHEAD):
                hasher.update(chunk)
        except OSError as error:
            raise self.unreadable(error) from error
        return hasher.hexdigest()

    def blocks(self, index: int, digest: str = "") -> Iterator[Block]:
        """The rows in blocks that say `index` as their file. Raises InputError where the file cannot be read, and at
        the end where its bytes were not those of `digest`: rows are cached under it, so they must be its rows."""
        with self.open() as file:
            try:
                if self.location.endswith(".parquet"):
                    yield from cut_table(index, file)
                    file.seek(0)  # a table is not read from front to back
                    read = self._digest_of(file) if digest else ""
                else:
                    hashed = _HashedFile(file)
                    buffered = io.BufferedReader(hashed, READ_AHEAD)
                    yield from cut_lines(index, _decompressed(self.location, cast(IO[bytes], buffered)))
                    while buffered.read(BLOCK):
                        pass  # what a reader leaves behind its last byte belongs to the file
                    read = hashed.hasher.hexdigest()
            except TooLongLine as error:
                raise InputError(
                    f"{self.flag}: {self.name}:{error}: this line is longer than {LONGEST_LINE >> 20} MiB; a .jsonl "
                    "file has one row a line"
                ) from error
            except _read_errors() as error:
                raise self.unreadable(error) from error
        if digest and read != digest:
            raise InputError(f"{self.flag}: {self.name} was changed while it was read; try again")

    def companion(self, name: str) -> bytes | None:
        """A small file in the same folder, or None where there is none. Raises InputError where it cannot be read."""
        beside = self.beside(name)
        if beside is None:
            return None
        with beside.open() as file:
            try:
                content = file.read(COMPANION_LIMIT + 1)
            except OSError as error:
                raise beside.unreadable(error) from error
        if len(content) > COMPANION_LIMIT:
            raise InputError(f"{self.flag}: {beside.name} is larger than {COMPANION_LIMIT >> 20} MiB: is it the file?")
        return content

    def beside(self, name: str) -> FileSource | None:
        """A file in the same folder, where there is one."""
        shown = _sibling(self.name, name)
        if self.hub is not None:
            hub_id, path = self.hub
            inner = _sibling(path, name)
            local = fetch_from_hub(hub_id, inner)
            return FileSource(shown, str(local), self.flag, None, (hub_id, inner)) if local else None
        location = _sibling(self.location, name)
        return FileSource(shown, location, self.flag, self.places) if is_file(location, self.places) else None


@dataclass(frozen=True)
class GeneratedSource:
    """Rows that a format makes up."""

    format: DatasetFormat
    split: Split
    flag: str = "--dataset"

    @property
    def name(self) -> str:
        """`arithmetic:train`."""
        return f"{self.format.name}:{self.split}"

    def _generate(self) -> Iterator[dict[str, Any]]:
        rows = self.format.generate(self.split)
        if rows is None:
            raise LlmftError(f"dataset {self.format.name} generated {self.split} rows once and now does not")
        return rows

    def digest(self) -> str:
        """SHA-256 of the rows as JSON."""
        return row_digest(self._generate())

    def blocks(self, index: int, digest: str = "") -> Iterator[Block]:
        """The rows, numbered from 1. `digest` is not checked: they follow from the options alone."""
        yield from cut_made(index, self._generate())

    def companion(self, name: str) -> bytes | None:
        """None: nothing lies beside rows that are made up."""
        return None


def is_uri(location: str) -> bool:
    """Whether it is written `scheme://…`."""
    return "://" in location


def place_of(places: Places | None, uri: str) -> Place:
    """Where a URI points. Raises LlmftError where this caller has no storage, InputError for a wrong URI."""
    if places is None:
        raise LlmftError(f"{uri} is read through a storage backend, and none is at hand here")
    return places.place(uri)


def is_file(location: str, places: Places | None) -> bool:
    """Whether a file is there, on this machine or in a store."""
    if not is_uri(location):
        return Path(location).is_file()
    from llmft_core.storage.transfer import exists

    return exists(place_of(places, location))


def _sibling(path: str, name: str) -> str:
    folder, slash, _ = path.rpartition("/")
    return f"{folder}{slash}{name}"


class _HashedFile(io.RawIOBase):
    """A file that is read once, from front to back, and hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file: Any = file
        self.hasher = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        self.hasher.update(memoryview(buffer)[:count])
        return count


def _decompressed(location: str, stream: IO[bytes]) -> IO[bytes]:
    """What the stream says, in as little memory as its format needs."""
    if location.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if location.endswith(".zst"):
        return cast(IO[bytes], zstd_module().ZstdFile(stream))
    return stream


def zstd_module() -> Any:
    """Python's own `compression.zstd`, or its backport."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _read_errors() -> tuple[type[Exception], ...]:
    """What readers raise for a file that is not what its name says; pyarrow's errors are ValueErrors."""
    zstd_error: type[Exception] = zstd_module().ZstdError
    return (OSError, ValueError, EOFError, zlib.error, zstd_error)
