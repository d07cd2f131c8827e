"""A run's states for exact resume: taken by each rank alone, written and published beside training."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from llmft_core.checkpoint.background import Background
from llmft_core.checkpoint.staging import Staging
from llmft_core.checkpoint.state import (
    Progress,
    Snapshot,
    bytes_of,
    copies,
    publish_state,
    views,
    write_fragments,
    write_progress,
)
from llmft_core.checkpoint.stored_state import list_states, remove_state
from llmft_core.errors import LlmftError
from llmft_core.extensions import Engine
from llmft_core.report import words
from llmft_core.storage.places import Place
from llmft_core.train.job import Job, Reporter
from llmft_core.train.saver import has_room
from llmft_core.weights.cache import cache_folder


class StateSaver:
    """Numbers the states of a run. Every rank has one, as a context around training. No collective."""

    def __init__(
        self, job: Job, engine: Engine, rank: int, reporter: Reporter, run: Place, checkpoints: Background | None = None
    ) -> None:
        """`checkpoints`: what publishes the run's checkpoints; a state is complete only after those before it."""
        self.job, self.engine, self.rank, self.reporter, self.run = job, engine, rank, reporter, run
        self.checkpoints = checkpoints
        self.count = job.resume.next_state if job.resume else 0
        self.background = Background()

    def save(self, step: int, guards: Mapping[str, Any]) -> None:
        """Copy what this rank holds after optimizer step number `step` (from 1) into host memory; all else happens in
        the background. `guards`: `Guards.memory`."""
        started = time.perf_counter()
        name = f"state_{self.count:05d}"
        self.count += 1
        self.background.wait()  # memory and disk never hold more than one
        waited = time.perf_counter() - started
        progress = Progress(step, self.engine.counters(), guards)
        trained = {n for n, parameter in self.engine.bare_model.named_parameters() if parameter.requires_grad}
        shapes = {n: shape for n, shape in self.engine.shapes().items() if n in trained}
        before = self.checkpoints.pending if self.checkpoints is not None else None
        taken = views(self.engine.fragments())
        size = bytes_of(taken)
        if has_room(size):
            taken = copies(taken)
            self.background.submit(
                lambda: self._publish(name, *self._written(name, taken, progress), shapes, step, started, before)
            )
        else:
            text = f"{name}: no room for {words.size(size)} in the memory of {socket.gethostname()}: training waits"
            self.reporter.send({"kind": "warning", "text": f"{text} while rank {self.rank} writes"})
            folder, written = self._written(name, taken, progress)
            self.background.submit(partial(self._publish, name, folder, written, shapes, step, started, before))
        if self.rank == 0:
            self.reporter.send({"kind": "stall", "seconds": time.perf_counter() - started, "waited": waited})

    def _written(self, name: str, taken: Snapshot, progress: Progress) -> tuple[Path, dict[str, dict[str, int]]]:
        """A whole staging folder with this rank's files, and what is in it. Raises LlmftError; nothing stays then."""
        staging = Staging.open(cache_folder(), self.job.plan.name, name)
        with staging.writing(name):
            written = write_fragments(taken, self.rank, staging.folder)
            if self.rank == 0:
                write_progress(progress, staging.folder)
        return staging.settle(), written

    def _publish(
        self,
        name: str,
        folder: Path,
        written: Mapping[str, Mapping[str, int]],
        shapes: Mapping[str, tuple[int, ...]],
        step: int,
        started: float,
        before: Future[None] | None,
    ) -> None:
        if before is not None and (failed := before.exception()) is not None:
            raise LlmftError(f"{name} is not published, because the checkpoint before it failed ({failed})")
        place, world_size = self.run / name, self.job.placement.world_size
        facts = {"provenance": dict(self.job.provenance)}
        size = publish_state(folder, place, self.rank, world_size, written, shapes, facts)
        if self.rank != 0:
            return
        seconds = time.perf_counter() - started
        told = {"name": name, "uri": place.uri, "step": step, "seconds": seconds, "bytes": size}
        self.reporter.send({"kind": "state", **told})
        complete = sorted(number for number, whole in list_states(self.run).items() if whole)
        for number in complete[: -self.job.plan.state.keep_last]:
            remove_state(self.run / f"state_{number:05d}")

    def __enter__(self) -> StateSaver:
        self.background.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.background.__exit__(*error)
