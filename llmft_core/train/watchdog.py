"""A rank that hangs is found: a thread beside training that looks whether it gets on, and ends the process if not.

A process that is stuck in a call of C, or waits in a collective for a rank that never comes, cannot raise an error.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import NamedTuple

from llmft_core.errors import LlmftError
from llmft_core.train.job import Reporter

PATIENCE_SECONDS = 3000.0
"""The least limit where a rank may wait for an upload of its own or another's, which have deadlines themselves, or for
a compiler."""
REPORTING_SECONDS = 5.0
"""Between a rank's report and its end, at least: the others, which wait for it, reach their limits and report too."""
REPORTING_SHARE = 0.05
"""And at least this share of the limit: ranks begin to wait as far from each other as a long forward pass takes."""
COLLECTIVES = ("distributed_c10d.py", "/deepspeed/comm/")
"""Where a rank is that waits for others, as far as Python sees it."""
BACKWARD = "_engine_run_backward"
"""The innermost Python function of a backward pass: what it waits for in C++ are the collectives of DDP."""


class Stage(NamedTuple):
    """What a rank is at."""

    number: int
    """Stages since the beginning: of two ranks that hang, the one with the lower number did not get to the other."""
    step: int
    """Optimizer step, from 1."""
    doing: str
    began: float
    """`time.monotonic()`."""


class Watchdog:
    """One rank's, a context around training. Limits are for one stage: a pass of a micro-batch, the application of a
    step, a round of an evaluation, a checkpoint."""

    def __init__(self, seconds: float, rank: int, reporter: Reporter) -> None:
        """`seconds` of a stage after which a rank hangs; 0: nobody looks."""
        self._seconds, self._rank, self._reporter = seconds, rank, reporter
        self._stage = Stage(0, 0, "the start", time.monotonic())
        self._patient = False
        self._done = threading.Event()
        self._trains = threading.get_ident()  # the thread that is watched
        self._thread = threading.Thread(target=self._watch, name="llmft-watchdog", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """A new stage begins in optimizer step `step` (from 1)."""
        self._stage = Stage(self._stage.number + 1, step, doing, time.monotonic())

    def saving(self, step: int, what: str) -> None:
        """A stage in which a rank may wait for an upload. The others may wait for that rank, here or later."""
        self._patient = True
        self.at(step, what)

    def compiling(self) -> None:
        """The same before the first step, for a compiler."""
        self._patient = True
        self.at(0, "the compilation of the model's blocks")

    def met(self) -> None:
        """All ranks have met: none of them is saving any more, or compiling."""
        self._patient = False

    @property
    def limit(self) -> float:
        """Seconds that the present stage may take."""
        return max(self._seconds, PATIENCE_SECONDS) if self._patient else self._seconds

    def _watch(self) -> None:
        while not self._done.wait(self._pause):
            self._arm()
            stage = self._stage
            seconds = time.monotonic() - stage.began
            if seconds > self.limit:
                self._report(stage, seconds)
                time.sleep(self._reporting)
                os._exit(LlmftError.exit_code)

    @property
    def _pause(self) -> float:
        return min(1.0, self._seconds / 4)

    def _arm(self) -> None:
        """Should training hold Python's lock, then this object's thread stands still too; faulthandler's does not."""
        spare = 2 * self._reporting + self._pause
        faulthandler.dump_traceback_later(self.limit + spare, exit=True, file=sys.__stderr__ or sys.stderr)

    @property
    def _reporting(self) -> float:
        return max(REPORTING_SECONDS, REPORTING_SHARE * self.limit)

    def _report(self, stage: Stage, seconds: float) -> None:
        frames = traceback.extract_stack(sys._current_frames()[self._trains])
        innermost = frames[-1]
        self._reporter.send(
            {
                "kind": "hung",
                "rank": self._rank,
                "host": socket.gethostname(),
                "stage": stage.number,
                "step": stage.step,
                "doing": stage.doing,
                "seconds": seconds,
                "at": f"{innermost.name} ({innermost.filename}:{innermost.lineno})",
                "waiting": is_waiting(frames),
                "stack": stacks(self._trains),
            }
        )

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._arm()  # before the thread has come to it
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._seconds:
            self._done.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()


def is_waiting(frames: traceback.StackSummary) -> bool:
    """Whether a thread waits for other ranks, so that it is not the one that hangs."""
    return frames[-1].name == BACKWARD or any(part in frame.filename for frame in frames for part in COLLECTIVES)


def stacks(first: int) -> str:
    """The Python stacks of all threads, that of thread `first` (its identifier) before the others."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = sorted(sys._current_frames().items(), key=lambda item: item[0] != first)
    parts = []
    for thread, frame in found:
        title = "the thread that trains" if thread == first else "thread"
        parts.append(
            f"{title} {names.get(thread, thread)}, innermost call last:\n{''.join(traceback.format_stack(frame))}"
        )
    return "\n".join(parts)
