"""Going on with a run: from which state, with what changed, and what of the run's folder has to go first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmft_core.checkpoint import state as states
from llmft_core.checkpoint import stored
from llmft_core.checkpoint.leftovers import next_numbers
from llmft_core.checkpoint.stored_state import StoredState, newest_state, open_state
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.storage.lease import NAME as LEASE
from llmft_core.storage.lease import Holder, wait_for_a_sign
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import download_many, exists, list_files, read_bytes
from llmft_core.train.aside import FOLDER as ASIDE
from llmft_core.train.job import Job, Resume
from llmft_core.values import fitting_micro_batch

DESCRIPTION = "plan.json"
HARMLESS = (
    "workers",
    "gpus-per-worker",
    "cluster",
    "strategy",
    "micro-batch",
    "eval-micro-batch",
    "gradient-checkpointing",
    "compile",
    "tracker",
    "checkpoint",
    "state",
    "storage",
    "backends",
    "weights",
    "disable-plugin",
    "deterministic",
    "on-nonfinite",
    "max-failures",
    "step-timeout",
    # An evaluation draws no random numbers and changes no weight.
    "eval-every-steps",
    # How rows are encoded, and limits past which a run does not start: what comes of it, tokens and labels, is held by
    # `check_inputs` against those of the beginning.
    "data.engine",
    "data.processes",
    "data.rehash",
    "data.max-dropped",
    "data.max-bad-rows",
)
"""What may change where a run goes on, with all below it: none of it is in the mathematics of a step, but for rounding.
Where there is dropout, other micro-batches draw other numbers: they stay as they were where they can, and
`other_numbers` says where they do not."""


UNDECIDED = ("epochs", "lr", "precision")
"""What a plan may leave open and the mathematics depend on: a run that goes on keeps what was decided."""


@dataclass(frozen=True)
class Point:
    """Where a run goes on: its folder, what it said of itself, and a complete state."""

    run: Place
    described: Mapping[str, Any]
    state: StoredState | None
    """None: the run was begun and has no complete state; it begins anew in its folder."""
    named: bool = False
    """Whether the user asked for this very state, also of a run that is complete."""
    dead: Holder | None = None
    """Whose lease on the run is to be taken over."""

    @property
    def plan(self) -> dict[str, Any]:
        """The plan that the run was started with, as JSON data."""
        plan: dict[str, Any] = self.described["plan"]
        return plan

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.progress.step if self.state is not None else 0

    @property
    def latest_plan(self) -> dict[str, Any]:
        """The plan under which the state was written, which a resumed run may have changed."""
        plan: dict[str, Any] = self.plan if self.state is None else self.state.manifest["provenance"]["plan"]
        return plan


def find_point(place: Place) -> Point:
    """`place` is a run's folder (its newest complete state is taken) or one of its states. Raises InputError where
    there is nothing to go on with, LlmftError where it is damaged: never a fresh start."""
    folder = place.parent if states.NAME.fullmatch(place.name) else place
    if not exists(folder / DESCRIPTION):
        raise InputError(f"{folder.uri} is no run: it has no {DESCRIPTION}: give <root>/runs/NAME, or a state in it")
    described = read_description(folder)
    state = place if folder is not place else newest_state(folder)
    if state is None:
        raise InputError(
            f"{folder.uri} has no complete state to go on from: start it again under another --name, with "
            "--state.every-steps N or --state.every-minutes N"
        )
    return Point(folder, described, open_state(state), named=folder is not place)


def find_begun(run: Place) -> Point | None:
    """Where the run of this folder goes on, at its beginning where it has no complete state yet; None where no run was
    ever begun there. Raises LlmftError where what is there is damaged."""
    if not exists(run / DESCRIPTION):
        return None
    state = newest_state(run)
    return Point(run, read_description(run), open_state(state) if state is not None else None)


def once_abandoned(point: Point, say: Callable[[str], None]) -> Point:
    """The point once nobody writes its run any more, as far as that has to be waited for: see `wait_for_a_sign`. Raises
    InputError where another process does."""
    dead = wait_for_a_sign(point.run, say)
    newest = None if point.named else newest_state(point.run)  # one may have become complete meanwhile
    return replace(point, dead=dead, state=open_state(newest) if newest is not None else point.state)


def read_description(run: Place) -> dict[str, Any]:
    """The run's plan.json. Raises InputError."""
    try:
        described: dict[str, Any] = json.loads(read_bytes(run / DESCRIPTION))
        described["plan"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{(run / DESCRIPTION).uri} is damaged ({error}): the run cannot go on") from error
    return described


def finished(point: Point, total_steps: int) -> str:
    """The complete checkpoint of the run's last optimizer step, or nothing; nothing too where a state was named, from
    which the rest is to be trained again."""
    if point.named:
        return ""
    for one in reversed(stored.list_checkpoints(point.run)):
        if one.complete and stored.read_manifest(one.place).get("step", 0) >= total_steps:
            return one.place.uri
    return ""


def decided(plan: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with what it leaves open as the run decided it."""
    return {**plan, **{name: before.get(name) for name in UNDECIDED if plan.get(name) is None}}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What of a plan changed that is not harmless, a line each: `lr: 1e-05, now 2e-05`."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        f"{path}: {json.dumps(old.get(path))}, now {json.dumps(new.get(path))}"
        for path in sorted({*old, *new})
        if not _is_harmless(path) and old.get(path) != new.get(path)
    ]


def _is_harmless(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in HARMLESS)


def _leaves(plan: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in plan.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield path, value


def check_inputs(point: Point, provenance: Mapping[str, Any], total_steps: int) -> None:
    """Raises Problems unless data, model and tokenizer are those of the run's beginning, and steps are left."""
    before = point.described
    pairs = {
        "dataset": (before["data"]["content"], provenance["data"]["content"], "other tokens or labels"),
        "model": (before["model"], provenance["model"], "other weights"),
        "model.tokenizer": (before["tokenizer"], provenance["tokenizer"], "another tokenizer"),
    }
    problems = [
        Problem(path, f"{what} than the run began with ({was[:12]}…, now {now[:12]}…): give back what it was")
        for path, (was, now, what) in pairs.items()
        if was != now
    ]
    if point.step >= total_steps or finished(point, total_steps):
        done = max(point.step, total_steps)
        why = (
            f"the run has done {done} of {total_steps} optimizer steps: give more, or name a state_NNNNN to go on from"
        )
        problems.append(Problem("max-steps", why))
    if problems:
        raise Problems(problems, f"{point.run.uri} cannot go on:")


def other_numbers(point: Point, job: Job) -> str:
    """What has to be said where the run has dropout, and draws other numbers for it than it would have drawn; or
    nothing. They depend on the place of the micro-batch in the global batch, and on what draws them."""
    if point.state is None or not job.dropout:
        return ""
    before = point.latest_plan
    share = before["global-batch"] // point.state.manifest["world_size"]
    rows, now = fitting_micro_batch(share, before["micro-batch"]), job.placement.micro_batch
    reasons = {
        f"micro-batches have {now} rows instead of {rows}": rows != now,
        "GPUs do not draw as CPUs do": bool(before["gpus-per-worker"]) != bool(job.plan.gpus_per_worker),
        "compiled blocks do not draw as others do": before.get("compile", False) != job.plan.compile,
    }
    if not any(reasons.values()):
        return ""
    why = " and ".join(reason for reason, holds in reasons.items() if holds)
    return f"{why}: dropout draws other numbers from here on, so losses will not be those of the run as it was"


def resume_at(point: Point) -> Resume:
    """The numbers from which the run goes on. What was written after the state is kept: new folders come after it."""
    numbers = next_numbers(point.run)
    state = point.state
    return Resume(
        state.place.uri if state is not None else "",
        point.step,
        next_state=numbers["state"],
        next_checkpoint=numbers["checkpoint"],
        guards=state.progress.guards if state is not None else {},
    )


def fetch_logs(run: Place, folder: Path) -> None:
    """What trackers wrote so far, into the folder that they go on writing."""
    names = [name for name in list_files(run) if not _is_ours(name)]
    download_many([(run / name, folder / name, None) for name in names])


def _is_ours(name: str) -> bool:
    """Whether a file of a run's folder is the core's own."""
    folder, slash, _ = name.partition("/")
    if not slash:
        return name in (DESCRIPTION, LEASE)
    return folder == ASIDE or bool(stored.NAME.fullmatch(folder) or states.NAME.fullmatch(folder))
