"""The engine under all transfers: a fixed crew of threads, each with one chunk of memory, under one deadline.

What is moved (a range of a download, a part of an upload, a whole small file) is a task; `downloads` and `uploads` make
them. Memory is at most `concurrency × chunk` bytes, whatever the files' sizes; one budget serves many small and few
large files alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TypeVar

from llmft_core.errors import LlmftError
from llmft_core.storage.faults import Patience, attempt
from llmft_core.storage.places import Place

T = TypeVar("T")
Task = Callable[[], None]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from any thread, one call at a time."""
FileDone = Callable[[Path, str], None]
"""Called with each local file that is complete (here, or in storage) and its SHA-256 (hex), from any thread, one call
at a time; more than once perhaps."""

SLOWEST = 2**20  # bytes/s; a transfer that is slower than this on the average is taken for dead
GRACE = 120.0  # seconds that any transfer may take
_LEAVING = 5.0  # seconds that Ctrl-C waits for requests in flight


@dataclass(frozen=True)
class Budget:
    """What a transfer may take: so many requests at once, and so many bytes of memory for each."""

    concurrency: int = 16
    chunk: int = 8 * 2**20  # larger ones end all at once, and the hash waits for the first

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.chunk < 1:
            raise ValueError(f"a transfer needs at least one request and one byte, not {self}")


STANDARD_BUDGET = Budget()


class Transfer:
    """One transfer of any number of files: its memory, its deadline, its progress, its end at the first error."""

    def __init__(self, budget: Budget, progress: Progress | None = None, deadline: float | None = None) -> None:
        """`deadline`: seconds for all, from now on; None: by the bytes that `expect` tells."""
        self.budget = budget
        self._progress = progress
        self._began = monotonic()
        self._deadline = deadline  # seconds after the beginning
        self._buffers: list[bytearray] = []
        self._telling = threading.Lock()
        self._stop = threading.Event()
        self._bytes_done = 0
        self.total = 0  # bytes

    def expect(self, total: int) -> None:
        """So many bytes are to be moved; where no deadline was given, in `GRACE` and a second for each MiB."""
        self.total = total
        if self._deadline is None:
            self._deadline = GRACE + total / SLOWEST

    def begin_again(self, done: int) -> None:
        """After an error: so many bytes are where they belong, the rest is to be moved, within the same deadline."""
        self._stop.clear()
        self._bytes_done = done

    @property
    def stopped(self) -> bool:
        """Whether an error, or Ctrl-C, ends this transfer."""
        return self._stop.is_set()

    def moved(self, size: int) -> None:
        """So many bytes more are where they belong."""
        with self._telling:
            self._bytes_done += size
            if self._progress is not None:
                self._progress(self._bytes_done, self.total)

    def take(self) -> bytearray:
        """One chunk of memory. A request that may be given up takes its own, and the next one gets another."""
        try:
            return self._buffers.pop()
        except IndexError:
            return bytearray(self.budget.chunk)

    def give(self, buffer: bytearray) -> None:
        """Nobody writes into this chunk of memory any more."""
        self._buffers.append(buffer)

    def ask(self, place: Place, action: Callable[[], T], size: int = 0) -> T:
        """A request to a store of at most a chunk, or of `size` bytes: repeated while its error may pass, while
        nothing else has failed, and until the deadline. Raises LlmftError."""
        left = self._left(place)
        waiting = 60 + max(size, self.budget.chunk * self.budget.concurrency) / SLOWEST  # all share one slow line
        patience = Patience(attempts=8, deadline=min(60.0, left), limit=min(waiting, left))
        return attempt(place, action, patience, self._stop.is_set)

    def _left(self, place: Place) -> float:
        """Seconds to the deadline."""
        if self._deadline is None:
            return GRACE
        left = self._deadline - (monotonic() - self._began)
        if left <= 0:
            raise LlmftError(
                f"{place.uri}: the transfer did not end within {self._deadline:.0f} s ({self._bytes_done} of "
                f"{self.total} bytes were moved): check the network, then start again: it continues where it stopped"
            )
        return left

    def run(self, tasks: Iterable[Task], at_once: int | None = None) -> None:
        """Works through the tasks in their order. After an error no task is begun, and it is raised once those that
        run have ended."""
        waiting = iter(tasks)
        taking = threading.Lock()
        errors: list[BaseException] = []

        def work() -> None:
            while not self._stop.is_set():
                try:
                    with taking:
                        task = next(waiting, None)
                    if task is None:
                        return
                    task()
                except BaseException as error:  # noqa: BLE001 - raised in the caller's thread, whatever it is
                    errors.append(error)
                    self._stop.set()

        size = min(self.budget.concurrency, at_once or self.budget.concurrency)
        crew = [threading.Thread(target=work, name="llmft-transfer", daemon=True) for _ in range(size)]
        try:
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()
        except BaseException:  # Ctrl-C
            self._stop.set()
            until = monotonic() + _LEAVING
            for thread in crew:
                if thread.ident is not None:
                    thread.join(max(0.0, until - monotonic()))
            raise
        if errors:
            raise errors[0]

    def each(self, actions: Iterable[Callable[[], T]]) -> list[T]:
        """The results of some actions that run at once, in their order."""
        listed = list(actions)
        results: dict[int, T] = {}

        def task(index: int) -> Task:
            def run() -> None:
                results[index] = listed[index]()

            return run

        self.run((task(index) for index in range(len(listed))), len(listed))
        return [results[index] for index in range(len(listed))]
