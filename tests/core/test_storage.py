"""Transfers, on a local folder and on filesystems that fail in known ways."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, LlmftError
from llmft_core.extensions import StorageBackend
from llmft_core.loading import load_plugins
from llmft_core.storage import check_storage, faults, transfer
from llmft_core.storage.places import Place, Places

CATALOG = Catalog(load_plugins())


def places(choice: dict[str, Any] | None = None) -> Places:
    return Places(CATALOG, choice, {})


class Faulty(LocalFileSystem):  # type: ignore[misc]
    """A local filesystem that raises the errors of `plan` one by one, before anything is done."""

    def __init__(self, plan: list[Exception]) -> None:
        super().__init__(auto_mkdir=True, skip_instance_cache=True)
        self.plan = plan
        self.calls = 0

    def _next(self) -> None:
        self.calls += 1
        if self.plan:
            raise self.plan.pop(0)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._next()
        return super().cat_file(path, start=start, end=end)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._next()
        super().pipe_file(path, value)


class Flipping(LocalFileSystem):  # type: ignore[misc]
    """Stores files of the right size with one byte changed."""

    def put_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        data = bytearray(Path(path1).read_bytes())
        data[len(data) // 2] ^= 1
        Path(path2).write_bytes(data)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        Path(path).write_bytes(bytes([value[0] ^ 1]) + value[1:])


class Cutting(LocalFileSystem):  # type: ignore[misc]
    """Never gives the last byte of what is asked for."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return bytes(super().cat_file(path, start=start, end=end))[:-1]


class Rewritten(LocalFileSystem):  # type: ignore[misc]
    """Somebody writes to the file while it is read."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data = bytes(super().cat_file(path, start=start, end=end))
        Path(path).write_bytes(b"y" * len(data))
        os.utime(path, (1, 1))
        return data


def over(filesystem: Any, folder: Path) -> Place:
    """A place in a backend that has this filesystem."""

    class TestStorage(StorageBackend):
        name = "test"
        summary = "a filesystem of a test"
        scheme = "test"

        def filesystem(self) -> Any:
            return filesystem

        def root(self) -> str:
            return str(folder)

    return Place(TestStorage(TestStorage.options_type()), str(folder))


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between attempts take milliseconds here."""
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)


# --- transfers --------------------------------------------------------------------------------------------------


def test_round_trip_on_a_local_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * 2**20 + 1))
    folder = places().place(str(tmp_path / "store"))
    assert transfer.list_files(folder) == {}
    sent = transfer.upload(source, folder / "a/b.bin")
    assert sent == hashlib.sha256(source.read_bytes()).hexdigest()
    transfer.write_bytes(folder / "empty", b"")
    assert transfer.list_files(folder) == {"a/b.bin": 3 * 2**20 + 1, "empty": 0}
    assert transfer.exists(folder / "a")
    assert transfer.read_bytes(folder / "a/b.bin", limit=7) == source.read_bytes()[:7]
    assert transfer.read_bytes(folder / "empty", limit=7) == b""
    assert transfer.download(folder / "a/b.bin", tmp_path / "new" / "copy") == sent
    assert (tmp_path / "new" / "copy").read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]
    transfer.delete(folder / "a/b.bin")
    transfer.delete(folder / "a/b.bin")
    assert not transfer.exists(folder / "a/b.bin")


def test_an_opened_file_seeks_and_reads(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"one\ntwo\nthree")
    with transfer.open_read(places().place(str(tmp_path)) / "lines") as file:
        assert list(file) == [b"one\n", b"two\n", b"three"]
        file.seek(-5, os.SEEK_END)
        assert file.read() == b"three"
        file.seek(100)
        assert file.read() == b""


def test_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BLOCK", 10)
    (tmp_path / "x").write_bytes(bytes(range(95)))
    place = places().place(str(tmp_path)) / "x"
    assert transfer.read_bytes(place) == bytes(range(95))
    assert transfer.read_bytes(place, limit=25) == bytes(range(25))
    assert transfer.download(place, tmp_path / "y") == hashlib.sha256(bytes(range(95))).hexdigest()


def test_probe_leaves_nothing(tmp_path: Path) -> None:
    check_storage.probe(places({"name": "local", "root": str(tmp_path / "new")}).runs())
    assert list(tmp_path.iterdir()) == [], "not even the folders that it made"


def test_probe_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to storage: .*give another --storage\.root") as caught:
        check_storage.probe(places({"name": "local", "root": str(tmp_path / "file")}).runs())
    assert caught.value.exit_code == 2


def test_what_is_missing_or_a_folder(tmp_path: Path) -> None:
    folder = places().place(str(tmp_path))
    for action in (transfer.read_bytes, transfer.open_read, lambda place: transfer.download(place, tmp_path / "t")):
        with pytest.raises(InputError, match="there is no such file or folder"):
            action(folder / "no")  # type: ignore[operator]
        with pytest.raises(InputError, match="is a folder, not a file"):
            action(folder)  # type: ignore[operator]
    with pytest.raises(InputError, match="nothing was uploaded"):
        transfer.upload(tmp_path / "no", folder / "x")
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_was_changed_on_the_way_is_found(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 1000)
    with pytest.raises(LlmftError, match=r"stored is damaged: .*do not use it"):
        transfer.upload(tmp_path / "source", over(Flipping(skip_instance_cache=True), tmp_path) / "stored")


def test_a_probe_that_was_changed_on_the_way_is_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this storage damages files"):
        check_storage.probe(over(Flipping(skip_instance_cache=True), tmp_path))


@pytest.mark.parametrize("filesystem", [Cutting, Rewritten])
def test_a_failed_download_leaves_nothing(tmp_path: Path, filesystem: Any) -> None:
    (tmp_path / "stored").write_bytes(b"x" * 1000)
    target = tmp_path / "target" / "file"
    with pytest.raises(LlmftError) as caught:
        transfer.download(over(filesystem(skip_instance_cache=True), tmp_path) / "stored", target)
    assert "\n" not in str(caught.value)
    assert list(target.parent.iterdir()) == []


def test_a_failed_download_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "stored").write_bytes(b"x" * 1000)
    (tmp_path / "target").write_bytes(b"old")
    with pytest.raises(LlmftError):
        transfer.download(over(Cutting(skip_instance_cache=True), tmp_path) / "stored", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"old"


def test_a_full_disk_is_found_before_the_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stored").write_bytes(b"x" * 1000)
    monkeypatch.setattr(transfer, "free_bytes", lambda path: 999)
    with pytest.raises(LlmftError, match=r"No space left on device .*1000 bytes, 999 are free"):
        transfer.download(places().place(str(tmp_path)) / "stored", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["stored"]


def test_a_listing_refuses_names_that_lead_out(tmp_path: Path) -> None:
    (tmp_path / "a\\..\\b").touch()
    with pytest.raises(InputError, match="not a relative path"):
        transfer.list_files(places().place(str(tmp_path)))


def test_a_failed_local_write_leaves_the_old_file(tmp_path: Path) -> None:
    place = places().place(str(tmp_path)) / "x"
    transfer.write_bytes(place, b"old")
    with pytest.raises(TypeError):
        place.fs.pipe_file(place.path, "not bytes")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


def test_free_bytes_of_a_folder_to_come(tmp_path: Path) -> None:
    assert transfer.free_bytes(tmp_path / "a" / "b") > 0


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), TimeoutError(), OSError(errno.EBUSY, "503"), OSError(errno.EREMOTEIO, "5")]
)
def test_a_passing_fault_is_tried_again(tmp_path: Path, error: Exception) -> None:
    filesystem = Faulty([error, error, error])
    transfer.write_bytes(over(filesystem, tmp_path) / "x", b"1")
    assert filesystem.calls == 4
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_lasting_fault_ends_in_one_line(tmp_path: Path) -> None:
    filesystem = Faulty([ConnectionResetError("reset\nby peer")] * 10)
    with pytest.raises(LlmftError) as caught:
        transfer.write_bytes(over(filesystem, tmp_path) / "x", b"1")
    assert str(caught.value) == f"test://{tmp_path}/x: ConnectionResetError: reset by peer"
    assert (filesystem.calls, caught.value.exit_code) == (7, 1)


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (PermissionError("no"), 2),
        (FileNotFoundError("no"), 2),
        (OSError(errno.ENOSPC, "full"), 1),
        (ValueError("?"), 1),
    ],
)
def test_other_faults_are_not_tried_again(tmp_path: Path, error: Exception, exit_code: int) -> None:
    filesystem = Faulty([error])
    with pytest.raises(LlmftError) as caught:
        transfer.write_bytes(over(filesystem, tmp_path) / "x", b"1")
    assert (filesystem.calls, caught.value.exit_code) == (1, exit_code)


def test_a_call_that_never_answers_is_left_behind(tmp_path: Path) -> None:
    place = over(LocalFileSystem(skip_instance_cache=True), tmp_path)
    never = threading.Event()
    with pytest.raises(LlmftError, match=r"TimeoutError: no answer within 0\.1 s"):
        faults.attempt(place, never.wait, faults.Patience(attempts=2, limit=0.1))
    never.set()


def test_no_attempt_begins_after_the_deadline(tmp_path: Path) -> None:
    filesystem = Faulty([TimeoutError()] * 10)
    place = over(filesystem, tmp_path) / "x"
    with pytest.raises(LlmftError):
        faults.attempt(place, lambda: place.fs.cat_file(place.path), faults.Patience(9, first_wait=3, deadline=1))
    assert filesystem.calls == 1
