"""What the driver tells every rank: plain JSON, never objects."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from llmft_core.errors import LlmftError
from llmft_core.plan import RunPlan
from llmft_core.values import Placement, WorkerRange


@dataclass(frozen=True)
class Resume:
    """Where a run goes on, instead of at its beginning."""

    state: str
    """URI of the complete state; empty: the run was started again before it had one, and begins anew."""
    step: int
    """Optimizer steps done by then."""
    next_state: int
    next_checkpoint: int
    """Numbers that no folder of the run has yet: what was written after the state stays as it is."""
    guards: Mapping[str, Any] = field(default_factory=dict)
    """`Guards.memory` as it was in the state."""


@dataclass(frozen=True)
class Job:
    """One training job, equal on all ranks of a node; the three folders are this node's copies."""

    plan: RunPlan
    placement: Placement
    total_steps: int
    epoch_steps: tuple[int, ...]
    """Optimizer steps of each epoch that the run begins; all of them together are at least `total_steps`."""
    vocabulary: int
    """Entries of the tokenizer, added tokens included."""
    pad_id: int
    stop_ids: tuple[int, ...]
    """Ids that end a generated answer, written into generation_config.json."""
    provenance: Mapping[str, Any]
    model: Path
    data: Path
    tokenizer: Path
    resume: Resume | None = None
    special_ids: tuple[int, ...] = ()
    """Ids whose embeddings have to be trained also where the model is frozen."""
    dropout: bool = False
    """Whether values are dropped at random in training."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch, and of every other one where none has fractions of a source."""
        return self.epoch_steps[0]

    @property
    def epochs(self) -> float:
        """Passes that the run makes: 2.5 ends in the middle of the third."""
        epoch, step = self.locate(self.total_steps - 1)
        return epoch + (step + 1) / self.epoch_steps[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """Where optimizer step `step` of the run lies: its epoch and its number there, both counted from 0."""
        epoch = bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.epoch_steps))

    def for_world_size(self, world_size: int) -> Job:
        """The job on so many ranks. Raises LlmftError where the plan does not have so many."""
        allowed = self.plan.worker_range or WorkerRange(self.placement.world_size, self.placement.world_size)
        if world_size == self.placement.world_size:
            return self
        if world_size not in allowed.sizes:
            raise LlmftError(f"there are {world_size} workers, and the plan has {allowed}")
        micro_batch = self.plan.micro_batch or self.placement.micro_batch
        return replace(self, placement=self.placement.for_world_size(world_size, micro_batch))

    def to_json(self) -> dict[str, Any]:
        """The job as JSON data."""
        return {
            **{name: getattr(self, name) for name in ("total_steps", "vocabulary", "pad_id", "dropout")},
            **{name: str(getattr(self, name)) for name in ("model", "data", "tokenizer")},
            "epoch_steps": list(self.epoch_steps),
            "stop_ids": list(self.stop_ids),
            "special_ids": list(self.special_ids),
            "provenance": dict(self.provenance),
            "plan": self.plan.to_json(),
            "placement": asdict(self.placement),
            "resume": asdict(self.resume) if self.resume else None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of `to_json`."""
        return cls(
            **{
                **data,
                "plan": RunPlan.from_json(data["plan"]),
                "placement": Placement(**data["placement"]),
                "epoch_steps": tuple(data["epoch_steps"]),
                "stop_ids": tuple(data["stop_ids"]),
                "special_ids": tuple(data["special_ids"]),
                "resume": Resume(**data["resume"]) if data["resume"] else None,
                **{name: Path(data[name]) for name in ("model", "data", "tokenizer")},
            }
        )


class Reporter(Protocol):
    """How a rank speaks to the driver: one plain event at a time, without waiting for an answer."""

    def send(self, event: dict[str, Any]) -> None:
        """Events have a `kind`: phase (`text`), warning (`text`), metrics (`step`, `epoch`, `metrics`, `publishing`: a
        checkpoint was under way), checkpoint (`name`, `uri`, `step`, `metrics`, `seconds`, `bytes`), state (`name`,
        `uri`, `step`, `seconds`, `bytes`), stall (`seconds` for which a checkpoint or state held training, of them
        `waited` for the one before), removed (`name` of a checkpoint that is not kept), restarted (`step` after which
        training goes on), hung (a rank that does not get on, before its process ends: `rank`, `host`, `step`, `doing`,
        `stage`, `seconds`, `at`, `waiting`, `stack`); under Ray also rank (`rank`, `host`, `node`, `world_size`),
        joined (`node` that wants the prepared data), failed (`deaths`: rank → how its process ended, empty for a Python
        error), preempted (ids of `nodes` that are taken away in `seconds` or None), and error (`message`, `rank`,
        `ours`: whether it is an LlmftError). From the driver itself: stopping (`text`)."""
