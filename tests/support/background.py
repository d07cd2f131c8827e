"""A real `llmft run` that goes on beside a test, which watches what it says."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from command import llmft_path


class BackgroundRun:
    """`llmft ARGS` in a folder; what it prints is in a file."""

    def __init__(self, *args: str, folder: Path, log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [llmft_path(), *args],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    @property
    def text(self) -> str:
        """All that it has said so far."""
        return self._log.read_text()

    def wait_for(self, words: str, seconds: float = 300) -> None:
        """Until it has said that. Fails where it ends, or takes longer."""
        self.wait_until(lambda text: words in text, words, seconds)

    def wait_until(self, is_so: Callable[[str], bool], what: str, seconds: float = 300) -> None:
        """Until that is so of all that it has said. Fails where it ends, or takes longer."""
        deadline = time.monotonic() + seconds
        while not is_so(self.text):
            assert self.process.poll() is None, f"ended without {what!r}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {what!r} within {seconds} s:\n{self.text}"
            time.sleep(0.02)

    def ended(self, seconds: float = 300) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(seconds)

    def workers(self) -> list[psutil.Process]:
        """The processes of the ranks that this machine's Ray has started for it; none for a cluster elsewhere."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in family if "RayTrainWorker" in " ".join(one.cmdline())]


@contextmanager
def background_run(*args: str, folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[BackgroundRun]:
    """A run that is over, with all its processes, when the block is."""
    running = BackgroundRun(*args, folder=folder, log=folder / "log", environment=environment or {})
    try:
        yield running
    finally:
        if running.process.poll() is None:
            family = psutil.Process(running.process.pid)
            for one in [*family.children(recursive=True), family]:
                one.kill()
            running.process.wait()
