"""What trackers write reaches the run's storage while the run goes on: a driver that dies takes no metrics with it."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llmft_core.errors import LlmftError
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import upload_many

EVERY_SECONDS = 30.0


class Keeper:
    """Copies the files of a folder to storage, those that changed, now and then and at the end. A context around the
    run; a failure is a warning and is tried again. Once everything is in storage the folder is removed."""

    def __init__(self, folder: Path, target: Place, warn: Callable[[str], None], every: float = EVERY_SECONDS) -> None:
        """`every`: seconds."""
        self._folder, self._target, self._warn, self._every = folder, target, warn, every
        self._sent: dict[Path, tuple[int, int]] = {}
        self._failing = False
        self._ending = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="llmft-keeper", daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def soon(self) -> None:
        """Copy now rather than later, in the background: a run that goes on from a state finds what led to it."""
        self._wake.set()

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._wake.set()
        self._thread.join()
        try:
            self.copy()
        except LlmftError as error:
            self._warn(f"metrics were not uploaded: {error}; they are kept in {self._folder}")
            return
        shutil.rmtree(self._folder)

    def copy(self) -> None:
        """Upload what changed since the last time. Raises LlmftError."""
        try:
            self._copy()
        except OSError as error:  # of this machine's disks: storage says what is wrong with it itself
            raise LlmftError(f"{self._folder}: {error}: free disk space, or set LLMFT_CACHE and TMPDIR") from error

    def _copy(self) -> None:
        changed: dict[Path, tuple[int, int]] = {}
        with tempfile.TemporaryDirectory(prefix="llmft-metrics-") as scratch:
            files = []
            for number, path in enumerate(sorted(self._folder.rglob("*"))):
                copied = Path(scratch) / str(number)  # because a tracker may write on while it is sent
                with suppress(FileNotFoundError):  # or remove it: a temporary file of its own
                    if path.is_file() and self._sent.get(path) != (state := _state(path)):
                        shutil.copyfile(path, copied)
                        files.append((copied, self._target / path.relative_to(self._folder).as_posix()))
                        changed[path] = state
            upload_many(files)
        self._sent |= changed

    def _work(self) -> None:
        while True:
            self._wake.wait(self._every)
            self._wake.clear()
            if self._ending:
                return
            try:
                self.copy()
                self._failing = False
            except LlmftError as error:
                if not self._failing:
                    self._warn(f"metrics are not being uploaded: {error}; it is tried again")
                self._failing = True


def _state(path: Path) -> tuple[int, int]:
    """Bytes, and the time of the last change in ns."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
