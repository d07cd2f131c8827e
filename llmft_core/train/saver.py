"""A run's checkpoints: taken with all ranks, written, published and removed beside training."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmft_core.checkpoint.adapter import AdapterStart
from llmft_core.checkpoint.background import Background, is_of_useless_weights
from llmft_core.checkpoint.export import Exported, WeightWriter, write_rest
from llmft_core.checkpoint.publish import publish, publish_part
from llmft_core.checkpoint.retention import Published, expendable, remove
from llmft_core.checkpoint.snapshot import Keep, Layout, gather, lay_out
from llmft_core.checkpoint.staging import Staging
from llmft_core.checkpoint.stored import list_checkpoints, read_manifest
from llmft_core.checkpoint.together import promised
from llmft_core.errors import one_line
from llmft_core.extensions import Engine
from llmft_core.report import words
from llmft_core.storage.places import Place
from llmft_core.train.job import Job, Reporter
from llmft_core.train.loop import summary_of
from llmft_core.train.memory_room import has_room
from llmft_core.weights.cache import cache_folder


class Saver:
    """Numbers the checkpoints of a run. Every rank has one, as a context around training.

    It is also the reporter of training: metrics say whether a checkpoint was being published meanwhile.
    """

    def __init__(
        self, job: Job, engine: Engine, rank: int, reporter: Reporter, run: Place, start: AdapterStart | None = None
    ) -> None:
        """`start`: where checkpoints are adapters, what these were before the first step."""
        self.job, self.engine, self.rank, self.reporter, self.run = job, engine, rank, reporter, run
        self.start = start
        self.count = job.resume.next_checkpoint if job.resume else 0
        # Retention decides over what lies there already too.
        self.published = published_before(run) if job.resume and rank == 0 else []
        self.background = Background(self._failed)

    def send(self, event: dict[str, Any]) -> None:
        """Pass an event on."""
        if event["kind"] == "metrics":
            event = {**event, "publishing": self.background.busy}
        self.reporter.send(event)

    def save(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Copy the model into host memory; all else happens in the background. Collective."""
        started = time.perf_counter()
        name = f"checkpoint_{self.count:05d}"
        self.count += 1
        self.background.wait()  # before the copy, so that memory and disk never hold more than one
        waited = time.perf_counter() - started
        layout = lay_out(self.engine, self.job.plan, self.job.placement.world_size, start=self.start)
        size = layout.bytes_of(self.rank)
        numbers = summary_of(metrics)
        facts = {"step": step, "epoch": epoch, "metrics": numbers, "provenance": dict(self.job.provenance)}
        if has_room(size):
            tensors: dict[str, dict[str, torch.Tensor]] = {}
            gather(self.engine, layout, self.rank, tensors.__setitem__)
            work = partial(self._write_and_publish, name, layout, tensors, facts, started)
        else:
            # A process that takes the machine's last memory is killed, and the run with it: file by file instead.
            text = f"{name}: no room for {words.size(size)} in the memory of {socket.gethostname()}: training waits"
            self.reporter.send({"kind": "warning", "text": f"{text} while rank {self.rank} writes"})
            written = self._written(name, layout, lambda write: gather(self.engine, layout, self.rank, write))
            work = partial(self._publish, name, layout, *written, facts, started)
        if size:
            self.background.submit(work)
        if self.rank == 0:
            self.reporter.send({"kind": "stall", "seconds": time.perf_counter() - started, "waited": waited})

    def _write_and_publish(
        self,
        name: str,
        layout: Layout,
        tensors: dict[str, dict[str, torch.Tensor]],
        facts: Mapping[str, Any],
        started: float,
    ) -> None:
        """Everything that training does not wait for."""

        def write_all(write: Keep) -> None:
            while tensors:  # each file's memory is let go once it is written
                write(*tensors.popitem())

        self._publish(name, layout, *self._written(name, layout, write_all), facts, started)

    def _written(self, name: str, layout: Layout, write_all: Callable[[Keep], None]) -> tuple[Path, Exported]:
        """A whole staging folder with this rank's files, and what is in it. Raises LlmftError; nothing stays then."""
        job = self.job
        with promised(self.run / name, self.rank):
            staging = Staging.open(cache_folder(), job.plan.name, name)
            with staging.writing(name):
                writer = WeightWriter(layout, job.model, staging.folder)
                write_all(writer.write)
                if self.rank == 0:
                    write_rest(layout, job.tokenizer, job.stop_ids, staging.folder)
        return staging.settle(), writer.exported()

    def _publish(
        self, name: str, layout: Layout, folder: Path, exported: Exported, facts: Mapping[str, Any], started: float
    ) -> None:
        target = self.run / name
        if self.rank != 0:
            publish_part(folder, target, exported, self.rank)
            return
        shapes, trained = layout.shapes, len(layout.trained)
        size = publish(folder, target, exported, facts, shapes=shapes, trained=trained, writers=layout.writers)
        self._announce(target, size, time.perf_counter() - started, facts)

    def _announce(self, place: Place, size: int, seconds: float, facts: Mapping[str, Any]) -> None:
        numbers = {"step": facts["step"], "metrics": facts["metrics"], "seconds": seconds, "bytes": size}
        self.reporter.send({"kind": "checkpoint", "name": place.name, "uri": place.uri, **numbers})
        self.published.append(Published(place, facts["metrics"]))
        for one in expendable(self.published, self.job.plan.checkpoint):
            remove(one.place)
            self.published.remove(one)
            self.reporter.send({"kind": "removed", "name": one.place.name})

    def _failed(self, error: Exception) -> None:
        """Rank 0 hears of every other's failure, and speaks for all."""
        if self.rank == 0:
            useless = is_of_useless_weights(error)
            what = "the run ends at the next checkpoint" if useless else "training goes on, and ends with this error"
            text = f"{one_line(error)}; {what}"
            self.reporter.send({"kind": "warning", "text": text})

    def __enter__(self) -> Saver:
        self.background.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.background.__exit__(*error)


def published_before(run: Place) -> list[Published]:
    """The complete checkpoints of a run that is resumed, in order."""
    found = [one for one in list_checkpoints(run) if one.complete]
    return [Published(one.place, read_manifest(one.place).get("metrics", {})) for one in found]
