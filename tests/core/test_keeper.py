"""Metrics in storage while the run goes on."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path

import pytest

from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.report.keeper import Keeper
from llmft_core.storage.places import Place, Places


def place(folder: Path) -> Place:
    return Places(Catalog(load_plugins()), None, {}).place(str(folder))


def test_metrics_are_there_before_the_run_ends(tmp_path: Path) -> None:
    folder, target = tmp_path / "local", tmp_path / "store"
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("1\n")
    arrived = threading.Event()
    with Keeper(folder, place(target), pytest.fail, every=0.01):
        for _ in range(1000):
            if (target / "metrics.jsonl").exists():
                arrived.set()
                break
            threading.Event().wait(0.01)
        (folder / "metrics.jsonl").write_text("1\n2\n")
        (folder / "tensorboard" / "events").write_text("x")
    assert arrived.is_set()
    assert (target / "metrics.jsonl").read_text() == "1\n2\n"
    assert (target / "tensorboard" / "events").read_text() == "x"
    assert not folder.exists()


def test_only_what_changed_is_sent(tmp_path: Path) -> None:
    folder, target = tmp_path / "local", tmp_path / "store"
    folder.mkdir()
    (folder / "a").write_text("1")
    (folder / "b").write_text("1")
    keeper = Keeper(folder, place(target), pytest.fail)
    keeper.copy()
    (target / "a").unlink()
    (folder / "b").write_text("22")
    keeper.copy()
    assert not (target / "a").exists()
    assert (target / "b").read_text() == "22"


def test_a_storage_that_fails_is_one_warning_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "a").write_text("1")
    (tmp_path / "store").write_text("a file where a folder should be")
    said: list[str] = []
    warned = threading.Event()

    def warn(text: str) -> None:
        said.append(text)
        warned.set()

    attempts, more = iter(range(1000)), threading.Event()
    keeper = Keeper(folder, place(tmp_path / "store" / "run"), warn, every=0.01)
    copy = keeper.copy

    def counted() -> None:
        if next(attempts) == 3:
            more.set()
        copy()

    keeper.copy = counted  # type: ignore[method-assign]
    with keeper:
        assert warned.wait(30)
        assert more.wait(30), "it is tried again, and no word of that"
    assert [text.split(":")[0] for text in said] == ["metrics are not being uploaded", "metrics were not uploaded"]
    assert str(folder) in said[-1]
    assert (folder / "a").exists()


def test_a_file_that_goes_meanwhile_and_a_full_disk_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = tmp_path / "local", tmp_path / "store"
    folder.mkdir()
    (folder / "a").write_text("1")
    (folder / "b").write_text("1")
    copyfile, said = shutil.copyfile, list[str]()

    def vanishing(source: Path, copy: Path) -> None:
        if source.name == "a":
            source.unlink()
        copyfile(source, copy)

    monkeypatch.setattr(shutil, "copyfile", vanishing)
    keeper = Keeper(folder, place(target), said.append)
    keeper.copy()
    assert [path.name for path in target.iterdir()] == ["b"]

    def full(source: Path, copy: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder / "b").write_text("22")
    monkeypatch.setattr(shutil, "copyfile", full)
    with keeper:
        pass
    assert (folder / "b").read_text() == "22"
    (warning,) = said
    assert warning.startswith(f"metrics were not uploaded: {folder}: [Errno 28] No space left on device: free disk")
