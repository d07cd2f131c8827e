"""Which tensors go into which file, and which rank writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_SHARD = 5_000_000_000
"""Bytes of one safetensors file at most, as transformers splits, unless one tensor alone is larger."""
LEAST_SHARD = 1_000_000_000
"""Smaller files than this are not made only to give every rank one."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    file: str
    names: tuple[str, ...]
    """Its tensors, in the model's order."""
    writer: int
    """The rank that keeps it in its memory, writes and uploads it."""


def divide(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, world_size: int, max_shard: int = MAX_SHARD
) -> list[Shard]:
    """A model's tensors in files, the files dealt out to the ranks in turn: a large model leaves through the network
    of all nodes."""
    total = sum(math.prod(shape) * itemsize for shape in shapes.values())
    limit = min(max_shard, max(LEAST_SHARD, -(-total // world_size)))
    groups = split(shapes, itemsize, limit)
    files = enumerate(shard_names(len(groups)))
    return [Shard(file, tuple(groups[number]), number % world_size) for number, file in files]


def split(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    """Names in the model's order, at most `limit` bytes a group unless one tensor alone is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * itemsize
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    return groups


def shard_names(count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors`."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
