"""Retention for a finished run: the rules of `--checkpoint.keep-last` and `keep-best`, by what lies in storage."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from llmft_core.checkpoint.retention import Published, expendable, remove
from llmft_core.checkpoint.stored import StoredCheckpoint, list_checkpoints, read_manifest
from llmft_core.errors import InputError
from llmft_core.plan import CheckpointOptions
from llmft_core.storage.lease import holder_of
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import delete_folder, last_written

YOUNG = 3600.0  # seconds; a run may still be writing an incomplete checkpoint that has a younger file


@dataclass
class Pruning:
    """What is to be done with each checkpoint of a run."""

    remove: list[StoredCheckpoint] = field(default_factory=list)
    keep: list[StoredCheckpoint] = field(default_factory=list)
    sweep: list[StoredCheckpoint] = field(default_factory=list)
    """Incomplete ones that go too."""
    leave: list[tuple[StoredCheckpoint, str]] = field(default_factory=list)
    """Incomplete ones that stay, and why."""
    unmeasured: list[StoredCheckpoint] = field(default_factory=list)
    """Complete ones without the metric by which the best are chosen."""


def decide(run: Place, options: CheckpointOptions, *, incomplete: bool) -> Pruning:
    """Reads every manifest, and removes nothing. `incomplete`: those without a marker go too, unless one of their files
    is younger than an hour. Raises InputError where `run` is not one run's folder, or
    is being written, LlmftError where a manifest is
    damaged."""
    found = list_checkpoints(run)
    if not found:
        raise InputError(f"{run.uri} holds no checkpoints: give a run's folder, `llmft checkpoint list` shows which")
    elsewhere = [one for one in found if one.place != run / one.name]
    if elsewhere:
        raise InputError(
            f"{run.uri} is not a run's folder, it holds {len({one.run for one in elsewhere})} below it: give one of "
            f"them, as {elsewhere[0].place.uri.rpartition('/')[0]}"
        )
    if incomplete and (holder := holder_of(run)) is not None:
        raise InputError(f"{run.uri} is being written by {holder}: prune it without --incomplete, or once it has ended")
    by_number = sorted(found, key=lambda one: int(one.name.rpartition("_")[2]))
    complete = [one for one in by_number if one.complete]
    published = [Published(one.place, read_manifest(one.place).get("metrics", {})) for one in complete]
    gone = {one.place for one in expendable(published, options)}
    pruning = Pruning(
        remove=[one for one in complete if one.place in gone],
        keep=[one for one in complete if one.place not in gone],
    )
    if options.keep_best:
        metric = options.best_by.replace("_", "/")
        pruning.unmeasured = [
            one for one, known in zip(complete, published, strict=True) if metric not in known.metrics
        ]
    for one in by_number:
        if one.complete:
            continue
        why = _why_left(one, time.time()) if incomplete else "--incomplete removes it"
        if why:
            pruning.leave.append((one, why))
        else:
            pruning.sweep.append(one)
    return pruning


def _why_left(one: StoredCheckpoint, now: float) -> str:
    """Why an incomplete checkpoint stays; empty where it may go."""
    written = last_written(one.place)
    if written is None:
        return "the store does not say how old it is: remove it by other means"
    if now - written < YOUNG:
        return (
            f"a file of it is {max(0, now - written) / 60:.0f} min old, and a run may be writing it: not before an hour"
        )
    return ""


def carry_out(one: StoredCheckpoint) -> None:
    """Remove a checkpoint: its marker first, where it has one."""
    if one.complete:
        remove(one.place)
    else:
        delete_folder(one.place)
