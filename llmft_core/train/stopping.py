"""Ctrl-C, SIGTERM, and nodes that are taken away: a run ends after a whole optimizer step, with a state to go on from.

The first signal while training asks for that; the second one, or one when there is nothing to save yet, stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any

from llmft_core.errors import Interrupted, Terminated

LOOK_EVERY = 1.0
"""Seconds between two looks of rank 0 whether it is to stop."""


class Stop:
    """The signals of the driver, as a context around all that a run does.

    Before training a signal raises KeyboardInterrupt. Leaving the context after SIGTERM it becomes Terminated.
    """

    def __init__(self) -> None:
        self.training = False
        """Whether there are ranks that can save a state: since their first step, until one of them is lost."""
        self.stateless = ""
        """Why the run's strategy can take no state, where it cannot."""
        self._asked_by = 0  # the first signal
        self._no_state = False
        # `put` may interrupt itself; the locks of Event and of a console may not.
        self._news: SimpleQueue[int] = SimpleQueue()
        self._abort: Callable[[int, FrameType | None], Any] | None = None

    def __enter__(self) -> Stop:
        # Signals belong to the main thread; elsewhere whoever started us has its own way to stop.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        if kind is KeyboardInterrupt and self._asked_by == signal.SIGTERM:
            raise Terminated("stopped by SIGTERM") from None

    def _install(self) -> None:
        # A program that a script started in the background ignores SIGINT, and goes on doing so.
        ignored = self._before[signal.SIGINT] is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self._asked_by
        self._asked_by = self._asked_by or number
        if first and self.training and not self._no_state:
            self._news.put(number)
        elif self._abort is not None:
            self._abort(signal.SIGINT, frame)
        else:
            raise KeyboardInterrupt

    def asked(self) -> bool:
        """Whether training is to end after the step that is being done."""
        return bool(self._asked_by)

    def at_once(self) -> None:
        """Stop without a state, from any thread: the run's folder is another process's now."""
        self._no_state = True
        os.kill(os.getpid(), signal.SIGTERM)  # to the process rather than to this thread: it wakes the main one

    def put_before(self, abort: Callable[[int, FrameType | None], Any]) -> None:
        """Ray Train has just replaced our handler by `abort`, which breaks the run off: it gets what follows the first
        signal."""
        self._abort = abort
        if self._main:
            self._install()

    @contextmanager
    def announced(self, announce: Callable[[str], None]) -> Iterator[None]:
        """While training: `announce` is called with what to say, in a thread of its own, when a state is asked for."""

        def wait() -> None:
            if number := self._news.get():
                what, again = (
                    ("stopping", "press Ctrl-C again") if number == signal.SIGINT else ("SIGTERM", "send it once more")
                )
                announce(f"{what}: {self.ending}; {again} to stop at once")

        thread = threading.Thread(target=wait, name="llmft-stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.training = False  # from here on a signal breaks off what is left
            self._abort = None
            self._news.put(0)
            thread.join()

    @property
    def ending(self) -> str:
        """What a run does that is asked to end."""
        if self.stateless:
            return f"ending after this step, without a state to go on from ({self.stateless})"
        return "saving a state after this step"

    def interrupted(self, told: str) -> Interrupted:
        """How the run ends. `told`: after which step, and how to go on."""
        if self._asked_by == signal.SIGTERM:
            return Terminated(f"stopped by SIGTERM{told}")
        return Interrupted(f"stopped by the user{told}")


class Lookout:
    """Rank 0's side of it under Ray, as a context around training: looks now and then, beside training, whether the
    driver asks it to stop or Ray is about to take a node of the run away."""

    def __init__(self, mailbox: Any, send: Callable[[dict[str, Any]], None]) -> None:
        self._mailbox, self._send = mailbox, send
        self._asked = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="llmft-lookout", daemon=True)

    def asked(self) -> bool:
        """Whether training is to end after the step that is being done."""
        return self._asked

    def __enter__(self) -> Lookout:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _work(self) -> None:
        import ray

        while not self._asked and not self._ending.wait(LOOK_EVERY):
            leaving, seconds = nodes_taken_away()
            if leaving:
                self._send({"kind": "preempted", "nodes": leaving, "seconds": seconds})
            self._asked = bool(leaving) or ray.get(self._mailbox.is_stopping.remote())


def nodes_taken_away() -> tuple[list[str], float | None]:
    """The ids of the nodes with ranks that Ray drains, and in how many seconds the first one will be gone (None: nobody
    said).

    Ray Train's watcher tells every worker of them. Its public `get_preemption_info` is a barrier over all ranks, which
    a training loop cannot afford; what it reads on this rank costs nothing.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return [], None
    seconds = None if info.deadline_ms is None else max(0.0, info.deadline_ms / 1000 - time.time())
    return info.preempted_node_ids, seconds
