"""An `llmft run` that is going on, to be disturbed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
from command import llmft_path

ENDS_WITHIN = 240  # seconds; this is a limit for a hanging run, not a promise


def _mind_ctrl_c() -> None:
    """Also where the tests were started in the background of a script, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """Started in a session of its own, as a shell starts a program; its output is in `log`."""

    def __init__(self, folder: Path, *args: str, environment: Mapping[str, str] | None = None) -> None:
        self.log = folder / "log"
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
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + ENDS_WITHIN
        while text not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.1)

    def look(self) -> dict[int, psutil.Process]:
        """Its processes, and those that it had when it was looked at before."""
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends while it is looked at
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.family |= {process.pid: process for process in children}
        return self.family

    def ctrl_c(self) -> None:
        """As a terminal does it: the whole process group gets the signal."""
        self.look()
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> int:
        """Its exit code. None of its processes is left then."""
        deadline = time.monotonic() + ENDS_WITHIN
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            self.look()
            time.sleep(0.1)
        _, alive = psutil.wait_procs(list(self.family.values()), timeout=60)
        assert not alive, [process.cmdline() for process in alive]
        return self.process.returncode

    def clean_up(self) -> None:
        """Whatever happened in the test, nothing stays."""
        if self.process.poll() is None:
            for process in [*self.look().values(), psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
