"""Publishing beside training: hashing, verifying and uploading never hold a rank, one checkpoint at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from llmft_core.checkpoint.export import Exported
from llmft_core.checkpoint.publish import publish
from llmft_core.storage.places import Place


class BackgroundPublisher:
    """Rank 0's uploads. At most one is under way: whoever comes with the next waits for it, so that a slow store makes
    training slower instead of filling the disk.

    `announce` gets (place, bytes, seconds, facts) of each checkpoint once it is complete; it is called in the
    publisher's thread. As a context manager it waits for the last upload, also when training failed: what was exported
    before is worth keeping.
    """

    def __init__(self, announce: Callable[[Place, int, float, Mapping[str, Any]], None]) -> None:
        self.announce = announce
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmft-publish")
        self.pending: Future[None] | None = None

    def submit(self, folder: Path, target: Place, exported: Exported, facts: Mapping[str, Any]) -> None:
        """Begin to publish an exported folder; returns at once unless the one before is still under way.

        Raises LlmftError where the one before failed: its local copy is kept and named.
        """
        self.wait()
        self.pending = self.executor.submit(self._publish, folder, target, exported, facts)

    def wait(self) -> None:
        """Until nothing is under way. Raises the LlmftError of a failed publication."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _publish(self, folder: Path, target: Place, exported: Exported, facts: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        size = publish(folder, target, exported, facts)
        self.announce(target, size, time.perf_counter() - started, facts)

    def __enter__(self) -> BackgroundPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
            elif self.pending is not None and self.pending.exception() is not None:
                error.add_note(f"and the last checkpoint failed too: {self.pending.exception()}")
        finally:
            self.executor.shutdown()
