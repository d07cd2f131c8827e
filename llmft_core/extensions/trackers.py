"""What watches a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmft_core.errors import Problem
from llmft_core.extensions.base import Extension


class Tracker(Extension, ABC):
    """Watches a run from the driver. It observes: an error in a tracker is reported and never changes the run."""

    def problems(self) -> list[Problem]:
        """What would keep it from watching (a package, a login), found on the driver before anything is started."""
        return []

    @abstractmethod
    def start(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """`folder` is local, the tracker's to write to, and is copied to the run's storage now and then and at the
        end."""

    def resume(self, folder: Path, plan: Mapping[str, Any], step: int) -> None:
        """Instead of `start`, where a run goes on after optimizer step `step`: what it logged so far lies in `folder`
        again, and what was logged after that step is taken back, since it will be logged anew."""
        self.start(folder, plan)

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers after an optimizer step or an evaluation, by name (`train/loss`, `eval/perplexity`)."""

    @abstractmethod
    def finish(self) -> None:
        """Flush and close."""

    def break_off(self, *, by_user: bool) -> None:
        """Instead of `finish`, where the run ended before its last step: by its user or a SIGTERM, or by an error."""
        self.finish()
