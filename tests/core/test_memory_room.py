"""What a rank may still take of its host's memory: in a container its limit counts, and not the machine's memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from llmft_core.train import memory_room
from llmft_core.train.memory_room import available_bytes, has_room

GIB = 2**30
FREE = 3 * GIB
"""Of the machine."""


def group(folder: Path, limit: str, used: int, cache: int, version: int) -> None:
    """A control group as Linux shows it."""
    limits, usage, cached = memory_room.FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limits).write_text(f"{limit}\n")
    (folder / usage).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cache}\n{cached} {cache}\n")


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory_room, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory_room, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    return tmp_path / "groups"


@pytest.mark.parametrize(("version", "line"), [(2, "0::/pod/rank"), (1, "4:cpu,memory:/pod/rank")])
def test_the_narrowest_group_counts(version: int, line: str, mounted: Path, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text(f"7:pids:/elsewhere\n{line}\n")
    root = mounted if version == 2 else mounted / "memory"
    group(root / "pod" / "rank", "max" if version == 2 else str(2**63 - 4096), GIB // 4, 0, version)
    group(root / "pod", str(GIB), GIB // 2, GIB // 8, version)
    assert available_bytes() == GIB // 2 + GIB // 8, "files that are only cached make room"


def test_a_container_that_sees_its_own_group_as_the_root(
    mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "membership").write_text("0::/a/path/of/the/host\n")
    group(mounted, str(GIB), GIB // 2, 0, 2)
    assert available_bytes() == GIB // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert has_room(GIB * 3 // 16)
    assert not has_room(GIB * 3 // 16 + 1), "of two ranks, with a quarter left"


def test_without_a_limit_the_machine_counts(mounted: Path, tmp_path: Path) -> None:
    assert available_bytes() == FREE, "there are no groups"
    (tmp_path / "membership").write_text("0::/\n")
    group(mounted, "max", GIB, 0, 2)
    assert available_bytes() == FREE
    group(mounted, str(8 * GIB), GIB, 0, 2)
    assert available_bytes() == FREE


def test_this_machines_own_groups_are_understood() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total
