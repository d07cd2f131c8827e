"""Trackers observe: an error in one is reported once and never changes a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmft_core.extensions import Tracker


class Trackers:
    """All trackers of a run as one; one that raises is dropped after a warning."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        self.trackers = list(trackers)
        self.warn = warn

    def start(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Start all; each may write to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._each(lambda tracker: tracker.start(folder, plan))

    def resume(self, folder: Path, plan: Mapping[str, Any], step: int) -> None:
        """As `start`, where a run goes on after optimizer step `step`."""
        self._each(lambda tracker: tracker.resume(folder, plan, step))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers after optimizer step `step`."""
        self._each(lambda tracker: tracker.log(metrics, step))

    def finish(self) -> None:
        """Close all."""
        self._each(lambda tracker: tracker.finish())

    def break_off(self, *, by_user: bool) -> None:
        """Close all, of a run that did not come to its end."""
        self._each(lambda tracker: tracker.break_off(by_user=by_user))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - a stranger's tracker may raise anything and must not end a run
                self.trackers.remove(tracker)
                self.warn(
                    f"tracker {tracker.name} stopped: {type(error).__name__}: {error}; the run goes on without it"
                )
