"""Where this node keeps a checkpoint until it is uploaded. A folder that is still being written is called `.partial`
and held by a lock; what a killed process left behind is swept, what was written whole is never removed by us. A state
stays one that is being written until it is published: half of it is of no use to anybody."""

from __future__ import annotations

import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from llmft_core.errors import LlmftError

FOLDER = "staging"
"""Below a node's cache."""
PARTIAL = ".partial"


@dataclass(frozen=True)
class Staging:
    """One folder that is being written by this process."""

    folder: Path
    _lock: FileLock

    @classmethod
    def open(cls, cache: Path, run: str, checkpoint: str) -> Staging:
        """A new folder in this node's cache; sweeps those that nobody writes any more. Raises LlmftError."""
        place = cache / FOLDER
        try:
            place.mkdir(parents=True, exist_ok=True)
            sweep(cache)
            # The host's name, because a cache on a network disk may be that of several nodes, and locks are of one.
            folder = place / f"{run}-{checkpoint}-{socket.gethostname()}-{uuid.uuid4().hex[:12]}{PARTIAL}"
            lock = _locked(folder)  # before the folder is there, so that nobody sweeps it
            folder.mkdir()
        except OSError as error:
            raise _unwritable(checkpoint, place, error) from error
        return cls(folder, lock)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Around all that writes into the folder. Where it fails nothing stays, and what is no LlmftError becomes one:
        it is the disk, of which safetensors and Python raise types of their own."""
        try:
            yield
        except LlmftError:
            self.discard()
            raise
        except Exception as error:
            self.discard()
            raise _unwritable(what, self.folder.parent, error) from error

    def settle(self) -> Path:
        """The folder is whole: it gets its final name, which is returned."""
        whole = self.folder.with_name(self.folder.name.removesuffix(PARTIAL))
        self.folder.rename(whole)
        self._unlock()
        return whole

    def discard(self) -> None:
        """What is in it is worth nothing, or published and gone."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        _lock_file(self.folder).unlink(missing_ok=True)
        self._lock.release()


def sweep(cache: Path) -> None:
    """Remove what processes of this host left half-written when they were killed."""
    for folder in (cache / FOLDER).glob(f"*-{socket.gethostname()}-*{PARTIAL}"):
        try:
            lock = _locked(folder)
        except Timeout:
            continue  # its process lives
        shutil.rmtree(folder, ignore_errors=True)  # another process may be sweeping too
        _lock_file(folder).unlink(missing_ok=True)
        lock.release()


def kept_copies(cache: Path) -> list[Path]:
    """Whole checkpoints that were never uploaded, or are about to be."""
    folders = (cache / FOLDER).iterdir() if (cache / FOLDER).is_dir() else ()
    return sorted(folder for folder in folders if folder.is_dir() and folder.suffix != PARTIAL)


def _unwritable(what: str, folder: Path, error: Exception) -> LlmftError:
    return LlmftError(
        f"{what} could not be written to {folder} ({error}): free disk space, or set LLMFT_CACHE to a larger disk"
    )


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _locked(folder: Path) -> FileLock:
    """Raises Timeout where another process has it."""
    lock = FileLock(_lock_file(folder), blocking=False, thread_local=False)  # another thread may publish what is there
    lock.acquire()
    return lock
