"""A run's states for exact resume: taken by each rank alone, written and published beside training."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
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
from llmft_core.checkpoint.together import promised
from llmft_core.errors import LlmftError, one_line
from llmft_core.extensions import Engine
from llmft_core.report import words
from llmft_core.storage.places import Place
from llmft_core.train.job import Job, Reporter
from llmft_core.train.memory_room import has_room
from llmft_core.weights.cache import cache_folder

Written = tuple[Staging, dict[str, dict[str, int]]]
"""A staging folder with a rank's files, and what is in each."""


class StateSaver:
    """Numbers the states of a run. Every rank has one, as a context around training. No collective."""

    def __init__(
        self, job: Job, engine: Engine, rank: int, reporter: Reporter, run: Place, checkpoints: Background | None = None
    ) -> None:
        """`checkpoints`: what publishes the run's checkpoints; a state is complete only after those before it."""
        self.job, self.engine, self.rank, self.reporter, self.run = job, engine, rank, reporter, run
        self.checkpoints = checkpoints
        self.count = job.resume.next_state if job.resume else 0
        self.background = Background(self._failed)
        self.last = False
        self.name = ""  # of the newest one
        self.staging: Staging | None = None  # its local files, while they are needed

    @property
    def busy(self) -> bool:
        """Whether this rank's part of the newest one is still being written or published."""
        return self.background.busy

    def save(self, step: int, guards: Mapping[str, Any], last: bool = False) -> None:
        """Copy what this rank holds after optimizer step number `step` (from 1) into host memory; all else happens in
        the background. `guards`: `Guards.memory`; `last`: the run ends here, and goes on from this state or not at
        all."""
        started = time.perf_counter()
        self.background.wait()  # memory and disk never hold more than one
        self.background.forgive()
        self.name = name = f"state_{self.count:05d}"
        self.count += 1
        self.last = last
        waited = time.perf_counter() - started
        progress = Progress(step, self.engine.counters(), guards)
        trained = {n for n, parameter in self.engine.bare_model.named_parameters() if parameter.requires_grad}
        shapes = {n: shape for n, shape in self.engine.shapes().items() if n in trained}
        before = self.checkpoints.pending if self.checkpoints is not None else None
        taken = views(self.engine.fragments())
        size = bytes_of(taken)
        publish = partial(self._publish, name, shapes, step, started, before)
        if has_room(size):
            taken = copies(taken)
            self.background.submit(lambda: publish(self._written(name, taken, progress)))
        else:
            text = f"{name}: no room for {words.size(size)} in the memory of {socket.gethostname()}: training waits"
            self.reporter.send({"kind": "warning", "text": f"{text} while rank {self.rank} writes"})
            try:
                written = self._written(name, taken, progress)
            except LlmftError as error:
                self.background.submit(partial(fail, error))
            else:
                self.background.submit(partial(publish, written))
        if self.rank == 0:
            self.reporter.send({"kind": "stall", "seconds": time.perf_counter() - started, "waited": waited})

    def _written(self, name: str, taken: Snapshot, progress: Progress) -> Written:
        """This rank's files, in a folder that is discarded once they are published or cannot be. Raises LlmftError;
        nothing stays then."""
        with promised(self.run / name, self.rank):
            self.staging = staging = Staging.open(cache_folder(), self.job.plan.name, name)
            with staging.writing(name):
                written = write_fragments(taken, self.rank, staging.folder)
                if self.rank == 0:
                    write_progress(progress, staging.folder)
        return staging, written

    def _publish(
        self,
        name: str,
        shapes: Mapping[str, tuple[int, ...]],
        step: int,
        started: float,
        before: Future[None] | None,
        written: Written,
    ) -> None:
        (staging, files), place, world_size = written, self.run / name, self.job.placement.world_size
        facts = {"provenance": dict(self.job.provenance)}
        try:
            with promised(place, self.rank):
                if before is not None and (failed := before.exception()) is not None:
                    raise LlmftError(f"{name} is not published, because the checkpoint before it failed ({failed})")
                size = publish_state(staging.folder, place, self.rank, world_size, files, shapes, facts)
        finally:
            staging.discard()
            self.staging = None
        if self.rank != 0:
            return
        seconds = time.perf_counter() - started
        told = {"name": name, "uri": place.uri, "step": step, "seconds": seconds, "bytes": size}
        self.reporter.send({"kind": "state", **told})
        try:
            self._remove_older()
        except LlmftError as error:
            text = f"{name} is complete, but a state that it replaces could not be removed: {one_line(error)}"
            self.reporter.send({"kind": "warning", "text": text})

    def _remove_older(self) -> None:
        """Complete states beyond those that are kept, and what there is of lost ones: every rank has sent its part of
        the newest one, and so has done with those before. Raises LlmftError."""
        states = list_states(self.run)
        complete = sorted(number for number, whole in states.items() if whole)
        lost = [number for number, whole in states.items() if not whole and number < complete[-1]]
        for number in [*complete[: -self.job.plan.state.keep_last], *lost]:
            remove_state(self.run / f"state_{number:05d}")

    def _failed(self, error: Exception) -> None:
        """Rank 0 hears of every other's failure, and speaks for all. Of the last state it is the run's error."""
        if self.rank == 0 and not self.last:
            text = f"{one_line(error)}; training goes on, and the next state is taken as if nothing had happened"
            self.reporter.send({"kind": "unpublished", "name": self.name, "text": text})

    def __enter__(self) -> StateSaver:
        self.background.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and not self.last:
            self.background.wait()
            self.background.forgive()  # the run came to its end: nobody needs a state of it
        try:
            self.background.__exit__(*error)
        finally:
            if self.staging is not None:  # Ctrl-C broke its upload off
                self.staging.discard()


def fail(error: LlmftError) -> None:
    """Work that has failed already."""
    raise error
