"""A run's checkpoints: taken with all ranks, written, published and removed beside training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llmft_core.checkpoint.background import Background
from llmft_core.checkpoint.export import write_rest, write_weights
from llmft_core.checkpoint.publish import publish, publish_part
from llmft_core.checkpoint.retention import Published, expendable, remove
from llmft_core.checkpoint.snapshot import Snapshot, take_snapshot
from llmft_core.checkpoint.staging import Staging
from llmft_core.errors import LlmftError
from llmft_core.extensions import Engine
from llmft_core.storage.places import Place
from llmft_core.train.job import Job, Reporter
from llmft_core.train.loop import summary_of
from llmft_core.weights.cache import cache_folder


class Saver:
    """Numbers the checkpoints of a run. Every rank has one, as a context around training.

    It is also the reporter of training: metrics say whether a checkpoint was being published meanwhile.
    """

    def __init__(self, job: Job, engine: Engine, rank: int, reporter: Reporter, run: Place) -> None:
        self.job, self.engine, self.rank, self.reporter, self.run = job, engine, rank, reporter, run
        self.count = 0
        self.published: list[Published] = []
        self.background = Background()

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
        snapshot = take_snapshot(self.engine, self.job.plan, self.rank, self.job.placement.world_size)
        numbers = summary_of(metrics)
        facts = {"step": step, "epoch": epoch, "metrics": numbers, "provenance": dict(self.job.provenance)}
        if snapshot.tensors:
            self.background.submit(lambda: self._publish(name, snapshot, facts))
        if self.rank == 0:
            self.reporter.send({"kind": "stall", "seconds": time.perf_counter() - started, "waited": waited})

    def _publish(self, name: str, snapshot: Snapshot, facts: Mapping[str, Any]) -> None:
        """Everything that training does not wait for."""
        started = time.perf_counter()
        job, target = self.job, self.run / name
        staging = Staging.open(cache_folder(), job.plan.name, name)
        try:
            exported = write_weights(snapshot, job.model, staging.folder)
            if self.rank == 0:
                write_rest(snapshot, job.tokenizer, job.stop_ids, staging.folder)
        except LlmftError:
            staging.discard()
            raise
        except Exception as error:  # the disk: safetensors and Python raise types of their own
            staging.discard()
            raise LlmftError(
                f"{name} could not be written to {staging.folder.parent} ({error}): free disk space, or set "
                "LLMFT_CACHE to a larger disk"
            ) from error
        folder = staging.settle()
        if self.rank != 0:
            publish_part(folder, target, exported, self.rank)
            return
        shapes, trained = snapshot.shapes, len(snapshot.trained)
        size = publish(folder, target, exported, facts, shapes=shapes, trained=trained, writers=snapshot.writers)
        self._announce(target, size, time.perf_counter() - started, facts)

    def _announce(self, place: Place, size: int, seconds: float, facts: Mapping[str, Any]) -> None:
        numbers = {"step": facts["step"], "metrics": facts["metrics"], "seconds": seconds, "bytes": size}
        self.reporter.send({"kind": "checkpoint", "name": place.name, "uri": place.uri, **numbers})
        self.published.append(Published(place, facts["metrics"]))
        for one in expendable(self.published, self.job.plan.checkpoint):
            remove(one.place)
            self.published.remove(one)
            self.reporter.send({"kind": "removed", "name": one.place.name})

    def __enter__(self) -> Saver:
        self.background.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.background.__exit__(*error)
