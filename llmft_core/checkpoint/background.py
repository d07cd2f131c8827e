"""Work beside training: writing, hashing, verifying and uploading never hold a rank, one checkpoint at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from llmft_core.errors import LlmftError, UselessWeights


class Background:
    """One rank's publishing. At most one checkpoint is under way: whoever comes with the next waits for it, so that a
    slow store makes training slower instead of filling memory and disk.

    Work that fails is told of when it does, and training goes on: a store that is away for minutes takes no run down.
    As a context manager it waits for the last one, also when training failed: what was taken before is worth keeping;
    then what has failed is the end's error. Only Ctrl-C (KeyboardInterrupt) leaves it behind: it stays incomplete.
    """

    def __init__(self, tell: Callable[[Exception], None] = lambda error: None) -> None:
        """`tell` is called with the error of work that failed, in its thread."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmft-publish")
        self._pending: Future[None] | None = None
        self._tell = tell
        self._failures: list[Exception] = []

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return self._pending is not None and not self._pending.done()

    @property
    def pending(self) -> Future[None] | None:
        """What is under way, or has ended and was not waited for yet."""
        return self._pending

    def submit(self, work: Callable[[], None]) -> None:
        """Begin; returns at once unless the work before is still under way. Raises as `wait`."""
        self.wait()
        self._pending = self._executor.submit(self._do, work)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._failures.append(error)
            self._tell(error)
            raise

    def wait(self) -> None:
        """Until nothing is under way. Raises UselessWeights of work that found them, and what is no LlmftError."""
        pending, self._pending = self._pending, None
        error = pending.exception() if pending is not None else None
        if error is not None and (not isinstance(error, LlmftError) or is_of_useless_weights(error)):
            raise error

    def forgive(self) -> None:
        """What has failed until now is replaced, and no error at the end."""
        self._failures.clear()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        at_once = isinstance(error, KeyboardInterrupt)
        try:
            if error is None:
                self.wait()
                if self._failures:
                    raise self._failures[0]
            elif not at_once and self._pending is not None and (failed := self._pending.exception()) is not None:
                error.add_note(f"and the last checkpoint failed too: {failed}")
        except KeyboardInterrupt:
            at_once = True
            raise
        finally:
            self._executor.shutdown(wait=not at_once)


def is_of_useless_weights(error: BaseException) -> bool:
    """Whether work failed for what it was to publish, rather than on the way."""
    return isinstance(error.__cause__ or error, UselessWeights)
