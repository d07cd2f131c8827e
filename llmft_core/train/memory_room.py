"""How much more host memory a rank may take: what the machine has free, and what the limit of its container leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By version of control groups: the limit, what is used (both in bytes), and what of that is a cache of files which the
kernel gives up first. Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst."""


def has_room(size: int) -> bool:
    """Whether every rank of this node may take so many bytes of its memory, with a quarter of what is free left."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return size * ranks <= 0.75 * available_bytes()


def available_bytes() -> int:
    """Bytes that this process may still take: the machine's, or those of its container where that has less. A process
    that takes more is killed."""
    return min([int(psutil.virtual_memory().available), *left_in_groups()])


def left_in_groups() -> Iterator[int]:
    """Bytes that each control group of this process leaves it: its own, and all above that it is in too."""
    if not MEMBERSHIP.is_file():
        return
    for line in MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 1 and "memory" not in controllers.split(","):
            continue
        mounted = CGROUPS / "memory" if version == 1 else CGROUPS
        # A container may see its own group as the root, under a path that is the host's: what is not there is left out.
        group = mounted / path.lstrip("/")
        for folder in (group, *group.parents):
            if (left := left_in(folder, version)) is not None:
                yield left
            if folder == mounted:
                break


def left_in(folder: Path, version: int) -> int | None:
    """Bytes under the limit of one group; None where there is none."""
    limit, used, cache = FILES[version]
    try:
        text = (folder / limit).read_text().strip()
        if text == "max":
            return None
        taken = int((folder / used).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except FileNotFoundError:
        return None
    return max(0, int(text) - taken + int(counts.get(cache, 0)))
