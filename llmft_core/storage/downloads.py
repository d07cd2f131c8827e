"""Files from storage to disk: in ranges, in parallel, hashed on the way, continued after an interruption."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from llmft_core.errors import ChangedMeanwhile, LlmftError
from llmft_core.storage.engine import STANDARD_BUDGET, Budget, FileDone, Progress, Task, Transfer
from llmft_core.storage.journal import Partial
from llmft_core.storage.objects import Source
from llmft_core.storage.ordered_hash import OrderedHash
from llmft_core.storage.places import Place


class DamagedFile(LlmftError):
    """What arrived is not what was promised."""


class DiskError(LlmftError):
    """The local disk refuses: full, not permitted, gone."""


class Exchange(Protocol):
    """Other nodes that fetch the same files at this moment: each brings some of the chunks from the store, for all.
    Called from any thread."""

    def opened(self, target: Path, version: str, handle: int, there: int) -> None:
        """The file grows behind this handle, which lives until it is complete; its first `there` bytes are there."""

    def is_brought(self, target: Path, start: int) -> bool:
        """Whether another node brings the chunk at byte `start`."""

    def read_into(self, target: Path, version: str, start: int, buffer: memoryview) -> bool:
        """Fills the buffer from the node that brings it, from exactly this version; False where it does not have it
        yet, after a moment of waiting. Raises LlmftError naming the node."""

    def arrived(self, target: Path, start: int) -> None:
        """The chunk at byte `start` is in the file, wherever it came from."""


@dataclass
class _File:
    """One file on its way."""

    place: Place
    target: Path
    expected: str | None  # SHA-256, hex
    transfer: Transfer
    exchange: Exchange | None = None
    source: Source | None = None
    partial: Partial | None = None
    digest: OrderedHash | None = None
    sha256: str = ""
    left: int = 0  # chunks that are still to come

    def __post_init__(self) -> None:
        self._counting = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes."""
        assert self.source is not None
        return self.source.size

    def look(self, told: tuple[int, str] | None = None) -> None:
        """Asks what the file is, unless the store has `told`."""
        self.source = Source(self.place, self.transfer.ask, told)

    def tasks(self) -> Iterator[Task]:
        """Opens the temporary file, and yields what is to be fetched into it."""
        chunk, source = self.transfer.budget.chunk, self.source
        assert source is not None
        origin = {"uri": self.place.uri, "version": source.version} if source.version else None
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.partial = Partial(self.target, self.size, chunk, origin)
        self.digest = OrderedHash(self.partial.handle, self.partial.note)
        there = self._resume(self.partial, self.digest) if self.partial.points else 0
        if self.exchange is not None:
            self.exchange.opened(self.target, source.version, self.partial.handle, there)
        missing = range(-(-there // chunk), -(-self.size // chunk))
        self.left = len(missing)
        if not missing:
            yield self._complete
        for index in missing:
            yield partial(self._fetch, index)

    def _resume(self, partial: Partial, digest: OrderedHash) -> int:
        """The bytes at the beginning that an earlier process has brought, and that are what it has brought."""
        buffer = self.transfer.take()
        try:
            there = digest.resume(partial.points, memoryview(buffer))
        finally:
            self.transfer.give(buffer)
        partial.trust(there)
        self.transfer.moved(there)
        return there

    def _fetch(self, index: int) -> None:
        assert self.source is not None
        assert self.partial is not None
        assert self.digest is not None
        chunk, source = self.transfer.budget.chunk, self.source
        start = index * chunk
        length = min(chunk, self.size - start)

        brought = self.exchange is not None and self.exchange.is_brought(self.target, start)

        def request() -> bytearray | None:
            # The request takes the memory itself, so that one which is given up does not write into another's.
            buffer = self.transfer.take()
            data, there = memoryview(buffer)[:length], True
            try:
                if brought and self.exchange is not None:
                    there = self.exchange.read_into(self.target, source.version, start, data)
                else:
                    source.read_into(start, data)
            except BaseException:
                self.transfer.give(buffer)
                raise
            if not there:
                self.transfer.give(buffer)
            return buffer if there else None

        while (buffer := self.transfer.ask(self.place, request)) is None:  # until the deadline
            if self.transfer.stopped:
                raise LlmftError(f"{self.place.uri}: given up, after another error")
        try:
            data = memoryview(buffer)[:length]
            self.partial.write(index, data)
            if self.exchange is not None:
                self.exchange.arrived(self.target, start)
            self.digest.add(start, data)
        finally:
            self.transfer.give(buffer)
        self.transfer.moved(length)
        with self._counting:
            self.left -= 1
            last = self.left == 0
        if last:
            self._complete()

    def _complete(self) -> None:
        assert self.source is not None
        assert self.partial is not None
        assert self.digest is not None
        buffer = self.transfer.take()
        try:
            sha256 = self.digest.hexdigest(self.size, memoryview(buffer))
        finally:
            self.transfer.give(buffer)
        self.source.check_unchanged()
        if self.expected is not None and sha256 != self.expected:
            raise DamagedFile(
                f"{self.place.uri}: {self.size} bytes with SHA-256 {sha256[:12]}… arrived, but {self.expected[:12]}… "
                "were promised; try again, or upload it again"
            )
        self.partial.finish()
        self.partial, self.sha256 = None, sha256


def download_files(
    files: Sequence[tuple[Place, Path, str | None]],
    free_bytes: Callable[[Path], int],
    budget: Budget = STANDARD_BUDGET,
    deadline: float | None = None,
    progress: Progress | None = None,
    done: FileDone | None = None,
    exchange: Exchange | None = None,
) -> list[str]:
    """See `transfer.download_many`; `free_bytes` tells how much room there is for a file."""
    transfer = Transfer(budget, progress, deadline)
    telling = threading.Lock()
    given = [_File(place, target, expected, transfer, exchange) for place, target, expected in files]
    _look(given, transfer)
    longest_first = sorted(given, key=lambda file: -file.size)
    transfer.expect(sum(file.size for file in given))

    def tell(file: _File, task: Task) -> None:
        try:
            task()
        except OSError as error:  # the local disk's: the store's errors are LlmftErrors by now
            raise _disk_error(file, error, free_bytes) from error
        if done is not None and file.sha256:
            with telling:
                done(file.target, file.sha256)

    def tasks() -> Iterator[Task]:
        for file in longest_first:
            try:
                for task in file.tasks():
                    yield partial(tell, file, task)
            except OSError as error:
                raise _disk_error(file, error, free_bytes) from error

    try:
        _check_room(given, free_bytes)
        transfer.run(tasks())
        for folder in {file.target.parent for file in given}:
            sync_folder(folder)
    except BaseException as error:
        worthless = isinstance(error, (ChangedMeanwhile, DamagedFile, DiskError))
        for file in given:
            if file.partial is not None:
                _end(file.partial, keep=not worthless)
        raise
    return [file.sha256 for file in given]


def _look(files: Sequence[_File], transfer: Transfer) -> None:
    """Asks what the files are: all at once, or first by a listing where they are more than can be asked at once."""
    told: dict[Place, tuple[int, str]] = {}
    if len(files) > transfer.budget.concurrency:
        for backend in {file.place.backend for file in files}:
            told |= _listed([file.place for file in files if file.place.backend is backend], transfer)
    transfer.each(partial(file.look, told.get(file.place)) for file in files)


def _listed(places: Sequence[Place], transfer: Transfer) -> dict[Place, tuple[int, str]]:
    first, paths = places[0], {place.path: place for place in places}
    reads = transfer.ask(first, lambda: first.ranged_reads)
    if reads is None:
        return {}
    found = transfer.ask(first, lambda: reads.describe_many(list(paths)))
    return {paths[path]: told for path, told in found.items()}


def _check_room(files: Sequence[_File], free_bytes: Callable[[Path], int]) -> None:
    """DiskError where a disk has less room than is to be written to it: better now than after an hour."""
    needed: dict[int, int] = {}  # device → bytes
    for file in files:
        device = _existing(file.target.parent).stat().st_dev
        there = file.target.parent / f".{file.target.name}.part"
        written = there.stat().st_blocks * 512 if there.is_file() else 0
        needed[device] = needed.get(device, 0) + max(0, file.size - written)
        if (free := free_bytes(file.target.parent)) < needed[device]:
            raise _full(file, os.strerror(errno.ENOSPC), needed[device], free)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _disk_error(file: _File, error: OSError, free_bytes: Callable[[Path], int]) -> DiskError:
    return _full(file, error.strerror or str(error), file.size, free_bytes(file.target.parent))


def _full(file: _File, said: str, needed: int, free: int) -> DiskError:
    return DiskError(
        f"{file.target}: {said} while downloading {file.place.uri} ({needed} bytes, {free} are free): "
        "free disk space or use another folder"
    )


def _end(partial: Partial, *, keep: bool) -> None:
    """Closes a temporary file while an error is on its way, which this must not replace by its own."""
    with suppress(OSError):
        if keep:
            partial.leave()
        else:
            partial.discard()


def sync_folder(folder: Path) -> None:
    """Makes renames in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
