"""Work beside training: writing, hashing, verifying and uploading never hold a rank, one checkpoint at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """One rank's publishing. At most one checkpoint is under way: whoever comes with the next waits for it, so that a
    slow store makes training slower instead of filling memory and disk.

    As a context manager it waits for the last one, also when training failed: what was taken before is worth keeping.
    Only Ctrl-C (KeyboardInterrupt) leaves it behind: it stays incomplete.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmft-publish")
        self._pending: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return self._pending is not None and not self._pending.done()

    @property
    def pending(self) -> Future[None] | None:
        """What is under way, or has ended and was not waited for yet."""
        return self._pending

    def submit(self, work: Callable[[], None]) -> None:
        """Begin; returns at once unless the work before is still under way. Raises the LlmftError of that."""
        self.wait()
        self._pending = self._executor.submit(work)

    def wait(self) -> None:
        """Until nothing is under way. Raises the LlmftError of work that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        at_once = isinstance(error, KeyboardInterrupt)
        try:
            if error is None:
                self.wait()
            elif not at_once and self._pending is not None and (failed := self._pending.exception()) is not None:
                error.add_note(f"and the last checkpoint failed too: {failed}")
        except KeyboardInterrupt:
            at_once = True
            raise
        finally:
            self._executor.shutdown(wait=not at_once)
