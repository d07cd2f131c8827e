"""Training state for exact resume: all that is not a pure function of the plan, as fragments in safetensors files.

    state_00000/
      rank-00000-00000.safetensors   what rank 0 held: tensors `KIND/START/NAME`, 1-d float32
      progress.json                  optimizer steps done, counters of the engine, memory of the guards
      manifest.json                  every file: bytes, SHA-256, its fragments; provenance
      .is_state                      the completion marker, written last

Each rank writes what it holds; nothing is gathered, nothing is pickled. A fragment is (name, start, length) of a
parameter's fp32 master or one of its moments, so any strategy and world size can read what another wrote.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.checkpoint.shards import MAX_SHARD, split
from llmft_core.checkpoint.together import Said, assemble, send_part
from llmft_core.errors import LlmftError
from llmft_core.storage.places import Place

if TYPE_CHECKING:
    import torch

    from llmft_core.extensions import Fragment

MARKER = ".is_state"
PROGRESS = "progress.json"
NAME = re.compile(r"state_(\d{5,})")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an optimizer step, beside its tensors."""

    step: int
    """Optimizer steps done: the next one is number `step`, counted from 0."""
    counters: Mapping[str, float]
    """`Engine.counters`."""
    guards: Mapping[str, Any] = field(default_factory=dict)
    """What those who watch over the steps remember, as JSON data: steps that were skipped, the last losses."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Progress:
        """The inverse of `dataclasses.asdict`. Raises TypeError for anything else."""
        return cls(**data)


Snapshot = dict[str, "torch.Tensor"]
"""`KIND/START/NAME` → values, 1-d float32."""


def key_of(name: str, kind: str, start: int) -> str:
    """The name of a fragment in its file."""
    return f"{kind}/{start}/{name}"


def parsed_key(key: str) -> tuple[str, str, int]:
    """The inverse of `key_of`: (name, kind, start)."""
    kind, start, name = key.split("/", 2)
    return name, kind, int(start)


def views(fragments: Iterable[Fragment]) -> Snapshot:
    """What a rank holds, still changing with training."""
    return {key_of(name, kind, start): values.detach() for name, kind, start, values in fragments}


def copies(taken: Snapshot) -> Snapshot:
    """Copies in host memory: all that training waits for."""
    return {key: values.to("cpu", copy=True) for key, values in taken.items()}


def bytes_of(taken: Snapshot) -> int:
    """Bytes of a rank's part."""
    return sum(values.numel() * values.element_size() for values in taken.values())


def write_fragments(taken: Snapshot, rank: int, folder: Path, largest: int = MAX_SHARD) -> dict[str, dict[str, int]]:
    """Writes a rank's files of at most `largest` bytes and empties `taken`: a copy's memory is free once it is written,
    and of views there is a copy of one file at a time. Returns file → fragment → elements."""
    from safetensors.torch import save_file

    groups = split({key: (len(values),) for key, values in taken.items()}, itemsize=4, limit=largest)
    written: dict[str, dict[str, int]] = {}
    for number, keys in enumerate(groups):
        if keys:
            file = f"rank-{rank:05d}-{number:05d}.safetensors"
            # Views of one flat tensor share its memory, which safetensors does not write.
            tensors = {key: values.to("cpu", copy=_is_view(values)) for key in keys for values in (taken.pop(key),)}
            save_file(tensors, folder / file)
            written[file] = {key: len(values) for key, values in tensors.items()}
    return written


def _is_view(values: torch.Tensor) -> bool:
    return bool(values.untyped_storage().nbytes() != values.numel() * values.element_size())


def write_progress(progress: Progress, folder: Path) -> None:
    """Rank 0's part beside its fragments."""
    (folder / PROGRESS).write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")


def verify_fragments(folder: Path, written: Mapping[str, Mapping[str, int]]) -> None:
    """Re-open this rank's files and hold their names, lengths and types against what was to be written. Raises
    LlmftError."""
    from safetensors import safe_open

    for file, promised in written.items():
        with safe_open(folder / file, framework="pt") as opened:
            found = {}
            for key in opened.keys():  # noqa: SIM118 - not a dictionary
                part = opened.get_slice(key)
                found[key] = math.prod(part.get_shape())
                if part.get_dtype() != "F32":
                    raise LlmftError(f"{file}: {key} is {part.get_dtype()}, not F32")
        if found != dict(promised):
            raise LlmftError(f"{file} does not hold the fragments that were to be written")


def publish_state(
    folder: Path,
    target: Place,
    rank: int,
    world_size: int,
    written: Mapping[str, Mapping[str, int]],
    shapes: Mapping[str, tuple[int, ...]],
    facts: Mapping[str, Any],
) -> int:
    """Upload this rank's files; rank 0 also waits for the others, and makes the state complete. `shapes` are those of
    all trained parameters. Returns the bytes of all on rank 0, else 0. Raises LlmftError; the local copy is of no use
    then: another rank's part of the state may be missing, and training goes on.
    """
    check = partial(verify_fragments, folder, written)
    said = {"fragments": written}
    if rank != 0:
        send_part(folder, target, rank, check, said, keep=False)
        return 0

    def manifest(parts: Sequence[Said]) -> dict[str, Any]:
        fragments = {file: found for part in parts for file, found in part["fragments"].items()}
        check_whole(fragments, shapes)
        return {"fragments": fragments, "world_size": world_size, **facts}

    return assemble(folder, target, world_size, check, said, manifest, MARKER, keep=False)


def check_whole(fragments: Mapping[str, Mapping[str, int]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises LlmftError unless the fragments are every element of every trained parameter exactly once, for each kind
    that there is."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for held in fragments.values():
        for key, length in held.items():
            name, kind, start = parsed_key(key)
            found.setdefault((name, kind), []).append((start, length))
    kinds = {kind for _, kind in found} | {"master"}
    for name, shape in shapes.items():
        for kind in kinds:
            position = 0
            for start, length in sorted(found.pop((name, kind), [])):
                if start != position:
                    break
                position += length
            if position != math.prod(shape):
                raise LlmftError(
                    f"the ranks do not hold {kind} of {name} once: its elements from {position} on are missing, or are "
                    "there twice: the strategy is at fault; tell its author"
                )
    if found:
        raise LlmftError(f"the ranks hold fragments of what is not trained: {sorted(found)[:3]}")


Fetch = Callable[[str], Path]
"""File of the state → its verified local copy."""


class Fragments:
    """What was written, by name and kind. Files are fetched when the first element of theirs is asked for."""

    def __init__(self, fragments: Mapping[str, Mapping[str, int]], fetch: Fetch) -> None:
        self._fetch = fetch
        self._opened: dict[str, Any] = {}
        self._found: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file, held in fragments.items():
            for key, length in held.items():
                name, kind, start = parsed_key(key)
                self._found.setdefault((name, kind), []).append((start, length, file, key))

    def read(self, name: str, kind: str, start: int, into: torch.Tensor) -> None:
        """Fills `into` (1-d) with the elements from `start` on. Raises LlmftError where some are not there: then the
        state is of another model."""
        into = into.detach()  # a master may be a leaf of autograd
        end, filled = start + len(into), 0
        for first, length, file, key in self._found.get((name, kind), []):
            low, high = max(start, first), min(end, first + length)
            if low < high:
                into[low - start : high - start] = self._slice(file, key)[low - first : high - first]
                filled += high - low
        if filled != len(into):
            raise LlmftError(
                f"the state holds {filled} of the elements {start} to {end} of {kind} of {name}: it is of another model"
            )

    def _slice(self, file: str, key: str) -> Any:
        from safetensors import safe_open

        if file not in self._opened:
            self._opened[file] = safe_open(self._fetch(file), framework="pt")
        return self._opened[file].get_slice(key)

    def close(self) -> None:
        """Let go of the files."""
        self._opened.clear()
