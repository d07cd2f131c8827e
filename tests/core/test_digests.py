"""Which files are read again: a digest is remembered only where nothing can have changed without being seen."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from servers import S3Server

from llmft_core.catalog import Catalog
from llmft_core.data import digests
from llmft_core.data.digests import Digests
from llmft_core.data.files import FileSource
from llmft_core.loading import load_plugins
from llmft_core.storage.places import Places


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Digests:
    """A memory that trusts files at once, so that no test has to wait for one to settle."""
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    return Digests(tmp_path / "digests")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def local(path: Path) -> FileSource:
    return FileSource(path.name, str(path), "--dataset.train", None)


def read_whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names: list[str] = []
    real = FileSource.digest

    def noted(self: FileSource) -> str:
        names.append(self.name)
        return real(self)

    monkeypatch.setattr(FileSource, "digest", noted)
    return names


def test_a_file_is_read_once(memory: Digests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    read = read_whole(monkeypatch)
    assert [memory.of(local(path), again=False) for _ in range(3)] == [sha256(b"one")] * 3
    assert read == ["rows.jsonl"]
    assert memory.of(local(path), again=True) == sha256(b"one")
    assert read == ["rows.jsonl"] * 2


def test_a_change_is_seen_though_size_and_time_are_the_same(memory: Digests, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    assert memory.of(local(path), again=False) == sha256(b"one")
    before = path.stat()
    time.sleep(0.02)  # beyond the resolution of the file system's clock
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert memory.of(local(path), again=False) == sha256(b"two")


def test_another_file_under_the_name_is_seen(memory: Digests, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    assert memory.of(local(path), again=False) == sha256(b"one")
    (tmp_path / "other").write_bytes(b"two")
    os.replace(tmp_path / "other", path)
    assert memory.of(local(path), again=False) == sha256(b"two")


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    assert Digests(tmp_path / "digests").of(local(path), again=False) == sha256(b"one")
    assert not (tmp_path / "digests").exists()


def test_a_damaged_memory_is_no_memory(memory: Digests, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    memory.of(local(path), again=False)
    (entry,) = memory.folder.iterdir()
    for damaged in ("", "[]", "{}", '{"sha256": "abc"}'):
        entry.write_text(damaged)
        assert memory.of(local(path), again=False) == sha256(b"one")


def test_an_object_is_known_by_its_version(
    memory: Digests, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    options = {"s3": {"endpoint-url": s3_server.endpoint_url}}
    places = Places(Catalog(load_plugins()), None, options)
    uri = f"s3://{s3_server.bucket}/digests/rows.jsonl"
    place, source = places.place(uri), FileSource(uri, uri, "--dataset.train", places)
    place.fs.pipe_file(place.path, b"one")
    read = read_whole(monkeypatch)
    assert [memory.of(source, again=False) for _ in range(2)] == [sha256(b"one")] * 2
    assert read == [uri]
    place.fs.pipe_file(place.path, b"two")
    place.fs.invalidate_cache()
    assert memory.of(source, again=False) == sha256(b"two")
