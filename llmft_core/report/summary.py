"""The end of a run: what happened, where it lies, how to use it."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmft_core.report import words

ENOUGH_STEPS = 5
WORTH_TELLING = 0.01
"""Share of the steps' time that may go into waiting for batches without a word."""
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
    waited: float = 0.0
    """Of them, seconds of waiting until the checkpoint before was published."""
    data_seconds: float = 0.0
    """Seconds for which the optimizer steps waited for their batches."""
    step_seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    """Seconds of each optimizer step, by whether a checkpoint was being published meanwhile."""
    lately: list[tuple[int, float]] = field(default_factory=list)
    """(optimizer steps done, seconds) of each step since the last state: what a failure now would cost."""
    adapter: bool = False
    """Whether the checkpoints are adapters."""
    unpublished: list[str] = field(default_factory=list)
    """Names of the states that were taken and could not be published."""
    restarts: int = 0
    """How often the workers were started again after a failure."""
    lost_steps: int = 0
    """Optimizer steps that were done again after it, and their seconds."""
    lost_seconds: float = 0.0
    stepped: float = 0.0
    """When the last optimizer step was reported, on the monotonic clock; at first, when training began."""
    skipped: set[int] = field(default_factory=set)
    """Optimizer steps that were not applied because loss or gradient were not finite; one that a restart does again is
    one."""
    stands: bool = False
    """Whether no step has been reported since a failure."""
    stood: float = 0.0
    """Seconds between the last optimizer step before each failure and the first one after it."""

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
    if skipped := len(outcome.skipped):
        lines.append(f"{words.counted(skipped, 'optimizer step')} not applied: loss or gradient not finite")
    stepping = sum(map(sum, outcome.step_seconds.values()))
    if outcome.data_seconds > WORTH_TELLING * stepping:
        lines.append(f"training waited for batches {words.share(outcome.data_seconds / stepping)} of its steps' time")
    lines.append(stall_line(outcome))
    if outcome.unpublished:
        lost = f"{words.counted(len(outcome.unpublished), 'state')} could not be published"
        lines.append(f"{lost}, the last one {outcome.unpublished[-1]}: the warnings above say why")
    if outcome.restarts:
        lines.append(
            f"the workers were started again {words.counted(outcome.restarts, 'time')}: "
            f"{words.counted(outcome.lost_steps, 'step')} of {words.duration(outcome.lost_seconds)} done again, "
            f"{words.duration(outcome.stood)} without training"
        )
    if outcome.best is not None:
        loss = outcome.best["metrics"]["eval/loss"]
        lines.append(f"best checkpoint: {outcome.best['uri']} (evaluation loss {loss:.4f})")
    uri = outcome.checkpoints[-1]["uri"]
    question = "Tom has 3 apples and buys 4 more. How many apples does he have now?"
    reach = access_flags(outcome.storage)
    command = ["llmft", "generate", *reach, uri, question]
    if outcome.adapter:
        whole = shlex.join(["llmft", "checkpoint", "merge", *reach, uri, "--out", f"{uri}-merged"])
        merging = [f"merge it: {whole}"]
        return [*lines, f"last adapter: {uri}", "", f"ask it:   {shlex.join(command)}", *merging]
    folder, fetch = uri, []
    if "://" in uri:
        folder = f"./{uri.rpartition('/')[2]}"
        fetch = [f"fetch it: {shlex.join(['llmft', 'checkpoint', 'pull', *reach, uri, folder])}"]
    return [
        *lines,
        f"last checkpoint: {uri}",
        "",
        f"ask it:   {shlex.join(command)}",
        *fetch,
        f"load it:  transformers.AutoModelForCausalLM.from_pretrained({folder!r})",
    ]


def stall_line(outcome: Outcome) -> str:
    """What checkpoints cost. The slowdown is told where both kinds of steps were seen often enough to compare."""
    line = f"checkpoints held training for {words.duration(outcome.stalled)}"
    if outcome.waited > 0.1 * outcome.stalled:
        line += f" ({words.duration(outcome.waited)} of it waiting for the upload before: write fewer, or nearer)"
    beside, alone = outcome.step_seconds[True], outcome.step_seconds[False]
    if min(len(beside), len(alone)) >= ENOUGH_STEPS:
        line += f"; steps beside uploads took {statistics.median(beside) / statistics.median(alone):.2f} times as long"
    return line


def access_flags(storage: Mapping[str, Any]) -> list[str]:
    """The flags with which another command reaches URIs of this storage."""
    flags = []
    for name, value in storage.items():
        if name in WHERE or value in ("", None, False):
            continue
        flag = f"--backends.{storage['name']}.{name}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags
