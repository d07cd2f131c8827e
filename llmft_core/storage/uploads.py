"""Files from disk to storage: in parts, in parallel, verified, continued after an interruption."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from llmft_core.errors import InputError, LlmftError
from llmft_core.extensions import VerifiedUploads
from llmft_core.storage.engine import STANDARD_BUDGET, Budget, FileDone, Progress, Task, Transfer
from llmft_core.storage.faults import transient
from llmft_core.storage.objects import Source
from llmft_core.storage.ordered_hash import OrderedHash
from llmft_core.storage.places import Place

TURNS = 3  # times that an upload is begun which the store drops
AT_ONCE = 4  # files that a filesystem's own put_file sends at once: gcsfs takes 50 MiB of memory for each


class DroppedUpload(LlmftError):
    """The store no longer knows an upload in parts: some do so after they refused one part."""


@dataclass
class _File:
    """One file on its way."""

    source: Path
    place: Place
    transfer: Transfer
    slots: threading.Semaphore
    handle: int = -1
    size: int = 0  # bytes
    sha256: str = ""
    upload: str = ""  # the store's id of the upload in parts
    tags: dict[int, str] = field(default_factory=dict)
    parts: int = 0

    def __post_init__(self) -> None:
        self._counting = threading.Lock()
        self._left = 0  # parts that are still to go

    def look(self) -> None:
        """Raises InputError where the file cannot be read."""
        try:
            with self.source.open("rb") as file:
                self._state = _state(file.fileno())
        except OSError as error:
            raise self._unreadable(error) from error
        self.size = self._state[0]

    def _open(self) -> None:
        try:
            self.handle = os.open(self.source, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from error
        self._digest = OrderedHash(self.handle)

    def _check_unchanged(self) -> None:
        if _state(self.handle) != self._state:
            raise self._changed()

    def close(self) -> None:
        """Once no thread reads it any more."""
        if self.handle >= 0:
            handle, self.handle = self.handle, -1
            os.close(handle)

    def tasks(self) -> Iterator[Task]:
        """What is to be done, in this order; large files in parts."""
        self._open()
        ask, place = self.transfer.ask, self.place
        writes = ask(place, lambda: place.verified_uploads)
        if writes is None:
            yield self._through_the_filesystem
        elif self.size <= self.transfer.budget.chunk:
            yield partial(self._whole, writes)
        else:
            # A part is a chunk of memory; only beyond `most_parts` chunks (80 GB) it has to be larger.
            length = max(self.transfer.budget.chunk, writes.least_part, -(-self.size // writes.most_parts))
            self.parts = self._left = -(-self.size // length)
            there = self._continued(writes, length)
            for number in range(1, self.parts + 1):
                yield partial(self._part, writes, number, length, there.get(number))

    # --- in parts -----------------------------------------------------------------------------------------------

    def _continued(self, writes: VerifiedUploads, length: int) -> dict[int, str]:
        """Continues the upload that an earlier process left, or begins one. Returns the tags of the parts that the
        store has, compared with ours."""
        ask, place = self.transfer.ask, self.place
        found = ask(place, lambda: writes.unfinished(place.path))
        if found is not None:
            there = ask(place, lambda: writes.parts(place.path, found))
            if all(self._is_ours(writes, number, length, part) for number, part in there.items()):
                self.upload = found
                return {number: tag for number, (_, tag) in there.items()}
        self.upload = ask(place, lambda: writes.begin(place.path))
        return {}

    def _is_ours(self, writes: VerifiedUploads, number: int, length: int, part: tuple[int, str]) -> bool:
        """Whether a part that the store has is what we would send. One other part makes it another file's upload,
        which somebody may be about to complete."""
        start = (number - 1) * length
        with _Chunk(self.transfer, length) as buffer:
            data = memoryview(buffer)[: max(0, min(length, self.size - start))]
            return part[0] == len(data) and part[1] == writes.tag(self._read(start, data))

    def _part(self, writes: VerifiedUploads, number: int, length: int, tag: str | None) -> None:
        start = (number - 1) * length
        with _Chunk(self.transfer, length) as buffer:
            data = self._read(start, memoryview(buffer)[: min(length, self.size - start)])
            if tag is None:
                path, upload = self.place.path, self.upload
                try:
                    tag = self.transfer.ask(self.place, lambda: writes.put_part(path, upload, number, data))
                except LlmftError as error:
                    if not self._was_dropped(writes, error):
                        raise
                    raise DroppedUpload(
                        f"{self.place.uri}: the store has dropped the unfinished upload at part {number} "
                        f"({error.__cause__}): nothing is there; upload {self.source} again"
                    ) from error
            self.tags[number] = tag
            self._digest.add(start, data)
            self.transfer.moved(len(data))
            with self._counting:
                self._left -= 1
                last = self._left == 0
            if last:
                self._complete(writes, memoryview(buffer))

    def _was_dropped(self, writes: VerifiedUploads, error: LlmftError) -> bool:
        """Whether a part failed because the store no longer knows its upload. A store may say so before it has read
        the part and then close the connection, and the answer is lost with it: so it is asked once more."""
        if isinstance(error.__cause__, FileNotFoundError):
            return True
        if not isinstance(error.__cause__, Exception) or not transient(error.__cause__):
            return False
        try:
            self.transfer.ask(self.place, lambda: writes.parts(self.place.path, self.upload))
        except LlmftError as answer:
            return isinstance(answer.__cause__, FileNotFoundError)
        return False

    def _complete(self, writes: VerifiedUploads, scratch: memoryview) -> None:
        ask, place = self.transfer.ask, self.place
        sha256 = self._digest.hexdigest(self.size, scratch)
        if _state(self.handle) != self._state:
            ask(place, lambda: writes.abandon(place.path, self.upload))
            raise self._changed()
        tags = [self.tags[number] for number in range(1, self.parts + 1)]
        shown = False
        try:
            shown = ask(place, lambda: writes.complete(place.path, self.upload, tags))
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            # Repeated after a lost answer, or completed by somebody else: what lies there decides.
            self._compare(sha256)
        if not shown and (stored := Source(place, ask).size) != self.size:
            raise self._damaged(f"{stored} bytes are there where {self.size} bytes were sent")
        self.sha256 = sha256
        self.close()

    # --- in one piece -------------------------------------------------------------------------------------------

    def _whole(self, writes: VerifiedUploads) -> None:
        data = self._read(0, memoryview(bytearray(self.size)))  # of just this size: a client sends it as it lies
        self._check_unchanged()
        self.transfer.ask(self.place, lambda: writes.put(self.place.path, data))
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.close()
        self.transfer.moved(self.size)

    def _through_the_filesystem(self) -> None:
        """put_file, and then one read-back."""
        place = self.place
        with self.slots:
            sha256 = self._hash()
            # One request of any length, which the client divides: only the transfer's deadline bounds it.
            self.transfer.ask(place, lambda: place.fs.put_file(str(self.source), place.path), self.size)
            self._check_unchanged()
            self._compare(sha256)
        self.sha256 = sha256
        self.close()
        self.transfer.moved(self.size)

    def _hash(self) -> str:
        sha256 = hashlib.sha256()
        with _Chunk(self.transfer, self.transfer.budget.chunk) as buffer:
            for start in range(0, self.size, len(buffer)):
                sha256.update(self._read(start, memoryview(buffer)[: self.size - start]))
        return sha256.hexdigest()

    def _compare(self, sha256: str) -> None:
        """LlmftError where what lies in storage is not what was sent: it is read back."""
        place, ask = self.place, self.transfer.ask
        stored = Source(place, ask)
        digest = hashlib.sha256()
        for start in range(0, stored.size, self.transfer.budget.chunk):
            digest.update(stored.read(start, min(self.transfer.budget.chunk, stored.size - start)))
        if (stored.size, digest.hexdigest()) != (self.size, sha256):
            raise self._damaged(
                f"{stored.size} bytes with SHA-256 {digest.hexdigest()[:12]}… came back where {self.size} bytes with "
                f"{sha256[:12]}… were sent"
            )

    # --- errors and bytes ---------------------------------------------------------------------------------------

    def _read(self, start: int, buffer: memoryview) -> memoryview:
        """The bytes of the local file from `start` on, as many as the buffer takes."""
        done = 0
        while done < len(buffer):
            read = os.preadv(self.handle, [buffer[done:]], start + done)
            if read == 0:
                raise self._changed()
            done += read
        return buffer

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.source}: {error.strerror or error}: nothing was uploaded to {self.place.uri}")

    def _damaged(self, what: str) -> LlmftError:
        return LlmftError(f"{self.place.uri} is damaged: {what}: do not use it, and upload {self.source} again")

    def _changed(self) -> LlmftError:
        return LlmftError(
            f"{self.source} was changed while it was uploaded to {self.place.uri}: do not use what is there, and "
            "upload it again once nobody writes to it"
        )


def _state(handle: int) -> tuple[int, int]:
    """Bytes and time of the last change (ns) of an open file."""
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns


class _Chunk:
    """A chunk of the transfer's memory for one task. A given-up request may go on reading it, which harms nobody but
    itself: what it sends then does not match its checksum."""

    def __init__(self, transfer: Transfer, length: int) -> None:
        self._transfer, self._length = transfer, length

    def __enter__(self) -> bytearray:
        self._buffer = self._transfer.take() if self._length <= self._transfer.budget.chunk else bytearray(self._length)
        return self._buffer

    def __exit__(self, *_: object) -> None:
        if self._length <= self._transfer.budget.chunk:
            self._transfer.give(self._buffer)


def upload_files(
    files: Sequence[tuple[Path, Place]],
    budget: Budget = STANDARD_BUDGET,
    deadline: float | None = None,
    progress: Progress | None = None,
    done: FileDone | None = None,
) -> list[str]:
    """See `transfer.upload_many`."""
    transfer = Transfer(budget, progress, deadline)
    slots = threading.Semaphore(AT_ONCE)
    given = [_File(source, place, transfer, slots) for source, place in files]
    try:
        for file in given:
            file.look()
        transfer.expect(sum(file.size for file in given))
        _send(transfer, sorted(given, key=lambda file: -file.size), done)
    finally:
        for file in given:
            file.close()
    return [file.sha256 for file in given]


def _send(transfer: Transfer, longest_first: Sequence[_File], done: FileDone | None) -> None:
    telling = threading.Lock()

    def tell(file: _File, task: Task) -> None:
        task()
        if done is not None and file.sha256:
            with telling:
                done(file.source, file.sha256)

    for turn in range(1, TURNS + 1):
        try:
            left = (file for file in longest_first if not file.sha256)
            transfer.run(partial(tell, file, task) for file in left for task in file.tasks())
        except DroppedUpload:
            if turn == TURNS:
                raise
            for file in longest_first:
                file.close()
            transfer.begin_again(sum(file.size for file in longest_first if file.sha256))
        else:
            return
