"""What the driver tells every rank: plain JSON, never objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from llmft_core.plan import RunPlan
from llmft_core.values import Placement


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


@dataclass(frozen=True)
class Job:
    """One training job, equal on all ranks of a node; the three folders are this node's copies."""

    plan: RunPlan
    placement: Placement
    total_steps: int
    steps_per_epoch: int
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

    def to_json(self) -> dict[str, Any]:
        """The job as JSON data."""
        return {
            **{name: getattr(self, name) for name in ("total_steps", "steps_per_epoch", "vocabulary", "pad_id")},
            **{name: str(getattr(self, name)) for name in ("model", "data", "tokenizer")},
            "stop_ids": list(self.stop_ids),
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
                "stop_ids": tuple(data["stop_ids"]),
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
        training goes on); under Ray also rank (`rank`, `host`), failed (`ranks` that were lost) and error (`message`,
        `rank`, `ours`: whether it is an LlmftError)."""
