"""The end of a run: what happened, where it lies, how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmft_core.report import words

WHERE = {"name", "root", "bucket", "prefix"}
"""Storage options that a URI already says."""


@dataclass
class Outcome:
    """What came of a run. Checkpoints are the events that announced them, in order."""

    storage: Mapping[str, Any]
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    first_loss: float | None = None
    last_loss: float | None = None
    steps: int = 0
    seconds: float = 0.0
    stalled: float = 0.0
    """Seconds for which checkpoints held training."""

    @property
    def best(self) -> dict[str, Any] | None:
        """The checkpoint with the lowest evaluation loss."""
        evaluated = [c for c in self.checkpoints if "eval/loss" in c["metrics"]]
        return min(evaluated, key=lambda c: float(c["metrics"]["eval/loss"])) if evaluated else None


def summary(outcome: Outcome) -> list[str]:
    """Lines for the terminal."""
    lines = ["", f"done: {words.counted(outcome.steps, 'optimizer step')} in {words.duration(outcome.seconds)}"]
    if outcome.first_loss is not None and outcome.last_loss is not None:
        lines.append(f"loss {outcome.first_loss:.4f} → {outcome.last_loss:.4f} nats per trained token")
    lines.append(f"checkpoints held training for {words.duration(outcome.stalled)}; uploads ran beside it")
    if outcome.best is not None:
        loss = outcome.best["metrics"]["eval/loss"]
        lines.append(f"best checkpoint: {outcome.best['uri']} (evaluation loss {loss:.4f})")
    uri = outcome.checkpoints[-1]["uri"]
    question = "Tom has 3 apples and buys 4 more. How many apples does he have now?"
    command = ["llmft", "generate", *access_flags(outcome.storage), uri, question]
    folder = uri if "://" not in uri else "a local copy of it"
    return [
        *lines,
        f"last checkpoint: {uri}",
        "",
        f"ask it:  {shlex.join(command)}",
        f"load it: transformers.AutoModelForCausalLM.from_pretrained({folder!r})",
    ]


def access_flags(storage: Mapping[str, Any]) -> list[str]:
    """The flags with which another command reaches URIs of this storage."""
    flags = []
    for name, value in storage.items():
        if name in WHERE or value in ("", None, False):
            continue
        flag = f"--backends.{storage['name']}.{name}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags
