"""How far a transfer is: a bar with bytes, rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from llmft_core.report import words
from llmft_core.report.live import LINE_EVERY_SECONDS


@contextmanager
def transfer_bar(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yields what `storage.transfer` takes as `progress`: called with the bytes done and the bytes in all. Nothing is
    shown before the first call: where all is there already, there is nothing to see."""
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    began = last_line = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        nonlocal last_line
        bar.start()
        bar.update(task, completed=done, total=total)
        now = time.monotonic()
        if not console.is_terminal and (done == total or now - last_line >= LINE_EVERY_SECONDS):
            last_line = now
            rate = done / max(now - began, 1e-3)  # bytes/s
            left = f" · {words.duration((total - done) / rate)} left" if 0 < done < total else ""
            console.print(
                f"{what}: {words.size(done)} of {words.size(total)} · {words.size(rate)}/s{left}", markup=False
            )

    try:
        yield show
    finally:
        bar.stop()
