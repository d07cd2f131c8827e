"""Which checkpoints of a run are kept, and how one is removed: only what is complete, its marker first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmft_core.checkpoint.publish import MARKER
from llmft_core.plan import CheckpointOptions
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import delete, delete_folder


@dataclass(frozen=True)
class Published:
    """A complete checkpoint of this run, in order of its number."""

    place: Place
    metrics: Mapping[str, float]


def expendable(published: Sequence[Published], options: CheckpointOptions) -> list[Published]:
    """Those that neither `keep-last` nor `keep-best` keeps; none where both are 0. The newest is always kept.

    A checkpoint without the metric that decides (no evaluation at its step) is worse than any that has it; of two equal
    ones the older is better.
    """
    if not options.keep_last and not options.keep_best:
        return []
    metric = options.best_by.replace("_", "/")
    ranked = sorted(range(len(published)), key=lambda i: (published[i].metrics.get(metric, math.inf), i))
    best = {i for i in ranked[: options.keep_best] if metric in published[i].metrics}
    kept = best | set(range(len(published) - max(1, options.keep_last), len(published)))
    return [one for i, one in enumerate(published) if i not in kept]


def remove(place: Place) -> None:
    """Delete a complete checkpoint. The marker goes first: whoever looks meanwhile sees an incomplete one."""
    delete(place / MARKER)
    delete_folder(place)
