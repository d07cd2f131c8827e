"""A lease on a run: a small file that its holder renews, so that two processes never write one run.

It is as good as the clocks: two machines that differ by more than `TTL` may both believe to hold it. Where a
run goes on, a lease that is not stale by these clocks is waited for, by this machine's alone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

import psutil

from llmft_core.errors import InputError, LlmftError
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import create, delete, exists, read_bytes, write_bytes

NAME = "lease.json"
TTL = 300.0  # seconds without a renewal after which a lease is nobody's
EVERY = 60.0  # seconds between two renewals
LOOK = 2.0  # seconds between two looks at a lease that may be a dead process's
SETTLE = 1.0  # seconds after which one of several writers at once is the last


@dataclass(frozen=True)
class Holder:
    """Who writes a run."""

    token: str
    host: str
    pid: int
    renewed: float
    """Seconds since 1970, by the holder's clock."""
    machine: str = ""
    """Where the process number counts, see `machine`; nothing: unknown."""

    @property
    def age(self) -> float:
        """Seconds since the last renewal, by this machine's clock."""
        return time.time() - self.renewed

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, last heard of {max(0.0, self.age):.0f} s ago"

    @property
    def gone(self) -> bool:
        """Whether nobody has been heard of for `TTL` seconds, or this machine knows that the process has ended."""
        here = bool(self.machine) and self.machine == machine()
        return self.age >= TTL or (here and not psutil.pid_exists(self.pid))


@cache
def machine() -> str:
    """This machine since its start, and its process numbers: two containers, or a machine and the one that replaced it,
    may have one host name. Nothing where the system (no Linux) does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def holder_of(run: Place) -> Holder | None:
    """Who writes a run now; None where nobody does."""
    found = _read(run)
    return found if found is not None and not found.gone else None


def refuse_if_held(run: Place) -> None:
    """Raises InputError where another process writes the run."""
    other = holder_of(run)
    if other is not None:
        raise _refusal(run, other)


def clear(run: Place, dead: Holder) -> None:
    """Removes the lease of a process that `wait_for_a_sign` found dead, unless it is another's by now."""
    if _read(run) == dead:
        delete(run / NAME)


def wait_for_a_sign(run: Place, say: Callable[[str], None]) -> Holder | None:
    """Whether the process that holds the lease is still there: wait until it renews it, for `TTL` seconds at most.
    `say` is called once with what is waited for.

    Returns None where nobody writes the run (any more), and the holder where its lease stood still all the time by this
    machine's clock: it is dead, whatever its own clock says, and although its process number may be in use here, where
    another container had this host name. Raises InputError where it lives.
    """
    first = holder_of(run)
    if first is None:
        return None
    say(
        f"{run.uri} belongs to {first}: waiting up to {TTL - max(0.0, first.age):.0f} s for a sign of life of it, and "
        "going on with the run if there is none; Ctrl-C stops waiting"
    )
    end = time.monotonic() + TTL
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(LOOK, left))
        now = holder_of(run)
        if now is None:
            return None
        if now != first:
            raise _refusal(run, now)
    return first


class Lease:
    """A run's lease, as a context: taken, renewed in a thread, given back.

    Raises InputError where another process has it; a stale one and that of the `dead` one are taken over. Where another
    process takes it over from us (this machine slept, or lost the network for minutes), `on_lost` is called, and
    leaving the context raises LlmftError.
    """

    def __init__(
        self,
        run: Place,
        warn: Callable[[str], None],
        on_lost: Callable[[], None],
        every: float = EVERY,
        dead: Holder | None = None,
    ) -> None:
        """`every`: seconds between two renewals. `dead`: what `wait_for_a_sign` returned."""
        self._run, self._warn, self._on_lost, self._every = run, warn, on_lost, every
        self._dead = dead
        self._token = uuid.uuid4().hex
        self._lost = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="llmft-lease", daemon=True)

    def __enter__(self) -> Lease:
        other = holder_of(self._run)
        if other is not None and other != self._dead:
            raise _refusal(self._run, other)
        stale = _read(self._run) is not None
        if stale or not self._run.backend.creates_exclusively:
            self._write()
        elif not create(self._run / NAME, self._content()):
            raise _refusal(self._run, _read(self._run))
        if stale or self._run.backend.scheme != "file":
            # Some servers ignore the condition, and a stale lease is written without one: the last writer has it.
            time.sleep(SETTLE)
        now = _read(self._run)
        if now is None or now.token != self._token:
            raise _refusal(self._run, now)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        if self._lost:
            raise LlmftError(
                f"{self._run.uri} was taken over by another process ({_read(self._run)}): this one has stopped writing"
            ) from error
        try:
            now = _read(self._run)
            if now is not None and now.token == self._token:
                delete(self._run / NAME)
        except LlmftError as failure:
            self._warn(f"the lease was not given back: {failure}; it ends by itself in {TTL:.0f} s")

    def _renew(self) -> None:
        failing = False
        while not self._ending.wait(self._every):
            try:
                now = _read(self._run)
                if now is not None and now.token != self._token:
                    self._lost = True
                    self._on_lost()
                    return
                self._write()
                failing = False
            except LlmftError as error:
                if not failing:
                    self._warn(f"the lease cannot be renewed: {error}; it is tried again")
                failing = True

    def _write(self) -> None:
        write_bytes(self._run / NAME, self._content())

    def _content(self) -> bytes:
        holder = Holder(self._token, socket.gethostname(), os.getpid(), time.time(), machine())
        return (json.dumps(asdict(holder)) + "\n").encode()


def _refusal(run: Place, other: Holder | None) -> InputError:
    who = f" by {other}" if other is not None else ""
    return InputError(f"name: {run.uri} is being written{who}: choose another --name, or wait until that run has ended")


def _read(run: Place) -> Holder | None:
    if not exists(run / NAME):
        return None
    try:
        return Holder(**json.loads(read_bytes(run / NAME)))
    except InputError:  # given back since
        return None
    except (ValueError, TypeError) as error:
        raise LlmftError(f"{(run / NAME).uri} is no lease ({error}): remove it if no process writes this run") from None
