"""An `llmft run` that is going on, to be disturbed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import psutil
from command import llmft_path

LIMIT = 300  # seconds; for a run that hangs, not a promise
SET_CHILD_SUBREAPER, GET_CHILD_SUBREAPER = 36, 37  # of prctl(2)


def command_of(process: psutil.Process) -> str:
    """Its command line; nothing where it has ended meanwhile, which processes of a run may do at any time."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # or a zombie
        return ""


@contextlib.contextmanager
def orphans_adopted() -> Iterator[None]:
    """While this lasts, processes whose parents have ended become children of this one, and `Running.end` finds those
    too that it never saw with their parents. Not where a test starts processes of its own beside a run."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def adopts_orphans() -> bool:
    """Whether this process does."""
    answer = ctypes.c_int()
    assert ctypes.CDLL(None).prctl(GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0) == 0
    return bool(answer.value)


def _mind_ctrl_c() -> None:
    """Also where the tests were started in the background of a script, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """`llmft ARGS` in a session of its own, as a shell starts a program; its output is in `log`. As a context: it is
    over, with all its processes, when the block is."""

    def __init__(self, folder: Path, *args: str, environment: Mapping[str, str] | None = None) -> None:
        self.log = folder / "log"
        self._others = set(psutil.Process().children())  # of the tests
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [llmft_path(), *args],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_mind_ctrl_c,
                env={**os.environ, **(environment or {})},
            )
        self.family: dict[int, psutil.Process] = {}

    @property
    def text(self) -> str:
        """All that it has said so far."""
        return self.log.read_text(errors="replace")  # a character may be half written

    def wait_for(self, words: str, seconds: float = LIMIT) -> None:
        """Until it has said that. Fails where it ends, or takes longer."""
        self.wait_until(lambda text: words in text, repr(words), seconds)

    def wait_until(self, is_so: Callable[[str], bool], what: str, seconds: float = LIMIT) -> None:
        """Until that is so of all that it has said. Fails where it ends, or takes longer."""
        deadline = time.monotonic() + seconds
        while True:
            over = self.process.poll() is not None  # before the look: it may say it and end
            if is_so(self.text):
                return
            assert not over, f"ended without {what}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.text}"
            time.sleep(0.02)

    def look(self) -> dict[int, psutil.Process]:
        """Its processes, and those that it had when it was looked at before."""
        found: list[psutil.Process] = []
        if self.process.returncode is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends while it is looked at
                found += psutil.Process(self.process.pid).children(recursive=True)
        if adopts_orphans():
            ours = set(psutil.Process().children()) - self._others
            found += [process for process in ours if process.pid != self.process.pid]
        self.family |= {process.pid: process for process in found}
        return self.family

    def workers(self) -> list[psutil.Process]:
        """The processes of the ranks that this machine's Ray has started for it; none for a cluster elsewhere."""
        return [process for process in self.look().values() if "RayTrainWorker" in command_of(process)]

    def ctrl_c(self) -> None:
        """As a terminal does it: the whole process group gets the signal."""
        self.look()
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, seconds: float = LIMIT) -> int:
        """Its exit code. None of its processes is left then."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            self.look()
            time.sleep(0.1)
        waited_for = -1
        while len(self.look()) > waited_for:  # children of an orphan are orphans when it ends
            waited_for = len(self.family)
            _, alive = psutil.wait_procs(list(self.family.values()), timeout=60)
            assert not alive, [command_of(process) for process in alive]
        return self.process.returncode

    def clean_up(self) -> None:
        """Whatever happened in the test, nothing stays."""
        family = list(self.look().values())
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)  # those that were adopted would stay zombies

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clean_up()
