"""Live progress on the driver: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmft_core.report import words

LINE_EVERY_SECONDS = 5.0
"""Between two lines of progress where the output is a file or a pipe."""


class LiveView:
    """One clean stream. Used as a context while training runs."""

    def __init__(self, total_steps: int, total_epochs: float) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.total_steps, self.total_epochs = total_steps, total_epochs
        self.last_line = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=total_steps, numbers="")

    def __enter__(self) -> LiveView:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that should be seen."""
        self.console.print(f"warning: {text}", markup=False, style="yellow")

    def phase(self, text: str) -> None:
        """What is being done before the first step."""
        self.progress.update(self.task, description=text)
        if not self.console.is_terminal:
            self.say(f"… {text}")

    def metrics(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Numbers after optimizer step `step` (from 1)."""
        numbers = f"loss {metrics['train/loss']:.4f} · {words.count(metrics['train/tokens_per_second'])} tokens/s"
        self.progress.update(self.task, completed=step, description=f"epoch {epoch + 1}", numbers=numbers)
        now = time.monotonic()
        if not self.console.is_terminal and (
            step in (1, self.total_steps) or now - self.last_line > LINE_EVERY_SECONDS
        ):
            self.last_line = now
            rate = f"lr {metrics['train/learning_rate']:.2e} · grad norm {metrics['train/grad_norm']:.2f}"
            self.say(f"step {step}/{self.total_steps} · epoch {epoch + 1} · {numbers} · {rate}")
        if "eval/loss" in metrics:
            self.say(
                f"step {step}: evaluation loss {metrics['eval/loss']:.4f} nats per trained token, "
                f"perplexity {metrics['eval/perplexity']:.2f}"
            )

    def checkpoint(self, event: dict[str, Any]) -> None:
        """A complete and verified checkpoint."""
        self.say(
            f"step {event['step']}: {event['name']} complete: {event['uri']} "
            f"({words.size(event['bytes'])} verified and uploaded in {words.duration(event['seconds'])})"
        )
