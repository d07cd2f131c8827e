"""Downloads by the transfer engine from real S3 servers."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, Proxy, fault_proxy, refusal
from s3_transfers import gets, lay, place_at, storage_at
from servers import S3Server
from transfers import MIB, SMALL, in_process, kill_once, sha256

from llmft_core import ChangedMeanwhile, LlmftError
from llmft_core.storage import transfer
from llmft_core.storage.engine import Budget
from llmft_core.storage.places import Place
from llmft_plugins.storage import s3


def test_in_chunks_and_in_order(remote: Place, stored: bytes, s3_proxy: Proxy, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = transfer.download_many(
        [(remote, tmp_path / "a" / "copy", sha256(stored))], budget=SMALL, progress=lambda *moved: told.append(moved)
    )
    assert found == [sha256(stored)]
    assert (tmp_path / "a" / "copy").read_bytes() == stored
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["copy"]
    assert (s3_proxy.count(b"HEAD"), s3_proxy.count(b"GET")) == (1, 6)
    assert told == sorted(told)
    assert told[-1] == (len(stored), len(stored))


def test_503_for_ever_ends_in_one_line(remote: Place, stored: bytes, s3_proxy: Proxy, tmp_path: Path) -> None:
    s3_proxy.faults = [Fault(gets, 1000, status_503=True)]
    with pytest.raises(LlmftError, match=r"keeps failing .*try again later") as caught:
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=SMALL)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [b"HEAD ", b"GET "])
def test_a_hang_ends_at_the_deadline(
    remote: Place, stored: bytes, s3_proxy: Proxy, tmp_path: Path, method: bytes
) -> None:
    s3_proxy.faults = [Fault(lambda head: head.startswith(method), 1000, hang=True)]
    began = time.monotonic()
    with pytest.raises(LlmftError, match=r"in time|did not end within"):
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=SMALL, deadline=2)
    assert time.monotonic() - began < s3.READ_TIMEOUT, "it waited for a silent request instead"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("server", ["rclone", "moto"])
def test_an_object_replaced_between_chunks_is_found(
    server: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto answers 412 to If-Match; rclone ignores it, and its answer's ETag tells."""
    running: S3Server = request.getfixturevalue("s3_server" if server == "rclone" else "moto_server")
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    other = os.urandom(5 * MIB)
    with fault_proxy(running.endpoint_url) as proxy:
        remote = place_at(proxy.url, "file", f"replaced-{server}")
        lay(running, remote, os.urandom(5 * MIB))

        def replace(head: bytes) -> None:
            if gets(head) and proxy.count(b"GET") == 3:
                lay(running, remote, other)

        proxy.before_answer = replace
        with pytest.raises(ChangedMeanwhile, match="was changed while it was downloaded"):
            transfer.download_many([(remote, tmp_path / "copy", None)], budget=Budget(1, MIB))
        assert list(tmp_path.iterdir()) == []
        proxy.before_answer = None
        assert transfer.download(remote, tmp_path / "copy") == sha256(other)


def test_a_killed_download_continues_in_another_process(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path
) -> None:
    content = os.urandom(32 * MIB)
    lay(s3_server, remote, content)
    code = """
        print(transfer.download_many([(place, Path(arguments[0]), None)], budget=Budget(4, MIB))[0])
    """
    test, target = remote.path.split("/")[1], tmp_path / "copy"
    s3_proxy.faults = [Fault(lambda head: gets(head) and s3_proxy.count(b"GET") > 24, 1000, hang=True)]
    first = in_process(code, storage_at(s3_proxy.url, test), str(target))
    journal = tmp_path / ".copy.part.journal"

    def noted() -> int:
        """Chunks; all that came in front of the first one that hangs are noted in the end."""
        return len(journal.read_bytes().split(b"\n")[1:-1]) if journal.exists() else 0

    # of 24 answers, 3 may belong to chunks behind the one that hangs
    kill_once(first, lambda: noted() > 24 - 4, "21 chunks in the journal")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".copy.part", ".copy.part.journal"]
    there, s3_proxy.faults, before = noted(), [], s3_proxy.answered
    second = in_process(code, storage_at(s3_proxy.url, test), str(target))
    assert second.communicate()[0].strip() == sha256(content)
    assert target.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    fetched = s3_proxy.answered - before
    assert fetched < (32 - there) * MIB + MIB / 2, f"{fetched / MIB:.1f} MiB came, {there} were there"


def test_what_was_interrupted_is_begun_anew_when_the_object_is_another(
    remote: Place, stored: bytes, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path
) -> None:
    s3_proxy.faults = [Fault(lambda head: gets(head) and s3_proxy.count(b"GET") > 3, 1000, status_503=True)]
    with pytest.raises(LlmftError):
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=Budget(1, MIB))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".copy.part", ".copy.part.journal"]
    other = os.urandom(len(stored))
    lay(s3_server, remote, other)
    s3_proxy.faults, before = [], s3_proxy.count(b"GET")
    assert transfer.download_many([(remote, tmp_path / "copy", None)], budget=Budget(1, MIB)) == [sha256(other)]
    assert s3_proxy.count(b"GET") - before == 6
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(
    remote: Place, stored: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = os.pwrite, [3 * MIB]

    def pwrite(handle: int, data: Any, offset: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(LlmftError, match=r"No space left on device while downloading .*free disk space"):
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_many_files_the_longest_first(remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path) -> None:
    contents = {f"f{size}": os.urandom(size) for size in (0, 1, 1000, 3 * MIB, 100, 2 * MIB + 1)}
    folder = Place(remote.backend, remote.path.rpartition("/")[0])
    for name, content in contents.items():
        lay(s3_server, folder / name, content)
    done: dict[str, str] = {}
    found = transfer.download_many(
        [(folder / name, tmp_path / name, None) for name in contents],
        budget=Budget(1, MIB),
        done=lambda path, digest: done.update({path.name: digest}),
    )
    assert found == [sha256(content) for content in contents.values()]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents
    assert list(done) == ["f3145728", "f2097153", "f1000", "f100", "f1", "f0"]


def test_more_files_than_requests_are_looked_up_by_one_listing(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path
) -> None:
    folder = Place(remote.backend, remote.path.rpartition("/")[0])
    contents = {f"f{number}": os.urandom(1000 + number) for number in range(6)}
    for name, content in contents.items():
        lay(s3_server, folder / name, content)
    wanted = [(folder / name, tmp_path / name, sha256(content)) for name, content in contents.items()]
    transfer.download_many(wanted, budget=SMALL)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents
    assert (s3_proxy.count(b"GET", b"list-type=2"), s3_proxy.count(b"HEAD"), s3_proxy.count(b"GET")) == (1, 0, 1 + 6)


def test_who_may_not_list_can_still_download(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path
) -> None:
    folder = Place(remote.backend, remote.path.rpartition("/")[0])
    for number in range(6):
        lay(s3_server, folder / f"f{number}", b"%d" % number)
    s3_proxy.faults = [Fault(lambda head: b"list-type=2" in head, 1, answer=refusal("403 Forbidden", "AccessDenied"))]
    transfer.download_many([(folder / f"f{n}", tmp_path / f"f{n}", None) for n in range(6)], budget=SMALL)
    assert [(tmp_path / f"f{number}").read_bytes() for number in range(6)] == [b"%d" % number for number in range(6)]
    assert s3_proxy.count(b"HEAD") == 6


def test_memory_is_bounded_by_the_budget(remote: Place, s3_proxy: Proxy, s3_server: S3Server, tmp_path: Path) -> None:
    """512 MiB with a budget of 4 × 4 MiB, in a process of its own."""
    assert s3_server.folder is not None
    test = remote.path.split("/")[1]
    source = s3_server.folder / test / "runs" / "file"
    source.parent.mkdir(parents=True)
    with source.open("wb") as file:
        file.truncate(512 * MIB)
    code = """
        transfer.write_bytes(place.__class__(place.backend, place.path + "-small"), b"x" * 100)
        small = place.__class__(place.backend, place.path + "-small")
        transfer.download(small, Path(arguments[0] + "-small"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        transfer.download_many([(place, Path(arguments[0]), None)], budget=Budget(4, 4 * MIB))
        between = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        transfer.upload_many([(Path(arguments[0]), small)], budget=Budget(4, 5 * MIB))
        print(before, between, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    process = in_process(code, storage_at(s3_server.endpoint_url, test), str(tmp_path / "copy"))
    before, downloaded, uploaded = map(int, process.communicate()[0].split())  # KiB
    assert downloaded - before < 40 * 1024
    assert uploaded - downloaded < 40 * 1024
    assert (tmp_path / "copy").stat().st_size == 512 * MIB
