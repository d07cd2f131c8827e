"""Metrics as TensorBoard event files, in the folder `tensorboard` of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmft_core import Options, Tracker, hookimpl

llmft_api = 1


class TensorBoard(Tracker):
    """Scalars under their own names, so that `train/loss` and `eval/loss` fall into groups; the plan as text."""

    name = "tensorboard"
    summary = "event files for TensorBoard"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._writer: Any = None

    def start(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Opens an event file; a resumed run adds another to the same folder, and TensorBoard joins them."""
        self._open(folder, plan, None)

    def resume(self, folder: Path, plan: Mapping[str, Any], step: int) -> None:
        """TensorBoard hides what older files say of later steps."""
        self._open(folder, plan, step + 1)

    def _open(self, folder: Path, plan: Mapping[str, Any], purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes 2 s, so only when chosen

        self._writer = SummaryWriter(folder / "tensorboard", flush_secs=10, purge_step=purge_step)
        self._writer.add_text("plan", f"```json\n{json.dumps(plan, indent=2, default=str)}\n```")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds one point a metric. Raises RuntimeError before `start`."""
        if self._writer is None:
            raise RuntimeError("tensorboard: log() was called before start()")
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@hookimpl
def llmft_trackers() -> list[type[Tracker]]:
    """TensorBoard."""
    return [TensorBoard]
