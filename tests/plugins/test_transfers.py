"""The transfer engine against real servers, with a proxy between that breaks things and counts bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, Proxy, fault_proxy, refusal
from servers import S3Server

from llmft_core import ChangedMeanwhile, InputError, LlmftError
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.storage import faults, transfer
from llmft_core.storage.engine import Budget
from llmft_core.storage.places import Place, Places
from llmft_core.testing import StorageBackendContract
from llmft_plugins.storage import s3

CATALOG = Catalog(load_plugins())
MIB = 2**20
SMALL = Budget(concurrency=4, chunk=MIB)


def place_at(url: str, name: str, test: str) -> Place:
    options = {"bucket": "bucket", "endpoint-url": url, "prefix": test}
    return Places(CATALOG, {"name": "s3", **options}, {}).runs() / name


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before rclone, with its key in the environment; waits between attempts take no time."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)
    with fault_proxy(s3_server.endpoint_url) as running:
        yield running


@pytest.fixture
def remote(proxy: Proxy, request: pytest.FixtureRequest) -> Place:
    """A place through the proxy, of this test alone."""
    return place_at(proxy.url, "file", request.node.name.replace("[", "-").replace("]", ""))


@pytest.fixture
def stored(remote: Place, s3_server: S3Server) -> bytes:
    """5 MiB and a bit, laid there behind the proxy's back."""
    content = os.urandom(5 * MIB + 17)
    lay(s3_server, remote, content)
    return content


def lay(server: S3Server, remote: Place, content: bytes) -> None:
    """Puts an object without the proxy."""
    prefix = remote.path.split("/")[1]
    transfer.write_bytes(place_at(server.endpoint_url, remote.name, prefix), content)


def gets(head: bytes) -> bool:
    return head.startswith(b"GET ")


def puts(head: bytes) -> bool:
    return head.startswith(b"PUT ")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def in_process(code: str, url: str, test: str, *arguments: str) -> subprocess.Popen[str]:
    """Runs code in a fresh process, with `place`, `transfer`, `Budget`, `MIB` and `arguments` at hand."""
    start = f"""
        import resource, sys, os
        from pathlib import Path
        from llmft_core.catalog import Catalog
        from llmft_core.loading import load_plugins
        from llmft_core.storage import transfer
        from llmft_core.storage.engine import Budget
        from llmft_core.storage.places import Places
        MIB = 2**20
        arguments = sys.argv[1:]
        options = {{"bucket": "bucket", "endpoint-url": {url!r}, "prefix": {test!r}}}
        place = Places(Catalog(load_plugins()), {{"name": "s3", **options}}, {{}}).runs() / "file"
    """
    program = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


# --- downloads ----------------------------------------------------------------------------------------------------


def test_in_chunks_and_in_order(remote: Place, stored: bytes, proxy: Proxy, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = transfer.download_many(
        [(remote, tmp_path / "a" / "copy", sha256(stored))], budget=SMALL, progress=lambda *moved: told.append(moved)
    )
    assert found == [sha256(stored)]
    assert (tmp_path / "a" / "copy").read_bytes() == stored
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["copy"]
    assert (proxy.count(b"HEAD"), proxy.count(b"GET")) == (1, 6)
    assert told == sorted(told)
    assert told[-1] == (len(stored), len(stored))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(gets, 3, reset_after=1000),
        Fault(gets, 3, truncate_after=70_000),
        Fault(gets, 3, status_503=True),
        Fault(gets, 1, hang=True),
    ],
    ids=["reset", "truncated", "503", "hang"],
)
def test_a_passing_fault_is_outlived(
    remote: Place, stored: bytes, proxy: Proxy, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault.hang:
        monkeypatch.setattr(s3, "READ_TIMEOUT", 3)
    proxy.faults = [fault]
    transfer.download_many([(remote, tmp_path / "copy", sha256(stored))], budget=SMALL)
    assert (tmp_path / "copy").read_bytes() == stored
    assert proxy.count(b"GET") == 6 + (1 if fault.hang else 3)


def test_503_for_ever_ends_in_one_line(remote: Place, stored: bytes, proxy: Proxy, tmp_path: Path) -> None:
    proxy.faults = [Fault(gets, 1000, status_503=True)]
    with pytest.raises(LlmftError, match=r"keeps failing .*try again later") as caught:
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=SMALL)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [b"HEAD ", b"GET "])
def test_a_hang_ends_at_the_deadline(remote: Place, stored: bytes, proxy: Proxy, tmp_path: Path, method: bytes) -> None:
    proxy.faults = [Fault(lambda head: head.startswith(method), 1000, hang=True)]
    began = time.monotonic()
    with pytest.raises(LlmftError, match=r"in time|did not end within"):
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=SMALL, deadline=2)
    assert time.monotonic() - began < s3.READ_TIMEOUT, "it waited for a silent request instead"
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_is_found_where_a_hash_is_expected(
    remote: Place, stored: bytes, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.faults = [Fault(gets, 1, flip_answer=500_000)]
    with pytest.raises(LlmftError, match=r"arrived, but .* were promised"):
        transfer.download_many([(remote, tmp_path / "copy", sha256(stored))], budget=SMALL)
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
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    content = os.urandom(32 * MIB)
    lay(s3_server, remote, content)
    code = """
        print(transfer.download_many([(place, Path(arguments[0]), None)], budget=Budget(4, MIB))[0])
    """
    test, target = remote.path.split("/")[1], tmp_path / "copy"
    proxy.faults = [Fault(lambda head: gets(head) and proxy.count(b"GET") > 24, 1000, hang=True)]
    first = in_process(code, proxy.url, test, str(target))
    journal = tmp_path / ".copy.part.journal"

    def noted() -> int:
        """Chunks; all that came in front of the first one that hangs are noted in the end."""
        return len(journal.read_bytes().split(b"\n")[1:-1]) if journal.exists() else 0

    wait_for(lambda: noted() > 24 - 4)  # of 24 answers, 3 may belong to chunks behind the one that hangs
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".copy.part", ".copy.part.journal"]
    there, proxy.faults, before = noted(), [], proxy.answered
    second = in_process(code, proxy.url, test, str(target))
    assert second.communicate()[0].strip() == sha256(content)
    assert target.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    fetched = proxy.answered - before
    assert fetched < (32 - there) * MIB + MIB / 2, f"{fetched / MIB:.1f} MiB came, {there} were there"


def test_what_was_interrupted_is_begun_anew_when_the_object_is_another(
    remote: Place, stored: bytes, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.faults = [Fault(lambda head: gets(head) and proxy.count(b"GET") > 3, 1000, status_503=True)]
    with pytest.raises(LlmftError):
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=Budget(1, MIB))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".copy.part", ".copy.part.journal"]
    other = os.urandom(len(stored))
    lay(s3_server, remote, other)
    proxy.faults, before = [], proxy.count(b"GET")
    assert transfer.download_many([(remote, tmp_path / "copy", None)], budget=Budget(1, MIB)) == [sha256(other)]
    assert proxy.count(b"GET") - before == 6
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


def test_many_files_the_longest_first(remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path) -> None:
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
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    folder = Place(remote.backend, remote.path.rpartition("/")[0])
    contents = {f"f{number}": os.urandom(1000 + number) for number in range(6)}
    for name, content in contents.items():
        lay(s3_server, folder / name, content)
    wanted = [(folder / name, tmp_path / name, sha256(content)) for name, content in contents.items()]
    transfer.download_many(wanted, budget=SMALL)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents
    assert (proxy.count(b"GET", b"list-type=2"), proxy.count(b"HEAD"), proxy.count(b"GET")) == (1, 0, 1 + 6)


def test_who_may_not_list_can_still_download(remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path) -> None:
    folder = Place(remote.backend, remote.path.rpartition("/")[0])
    for number in range(6):
        lay(s3_server, folder / f"f{number}", b"%d" % number)
    proxy.faults = [Fault(lambda head: b"list-type=2" in head, 1, answer=refusal("403 Forbidden", "AccessDenied"))]
    transfer.download_many([(folder / f"f{n}", tmp_path / f"f{n}", None) for n in range(6)], budget=SMALL)
    assert [(tmp_path / f"f{number}").read_bytes() for number in range(6)] == [b"%d" % number for number in range(6)]
    assert proxy.count(b"HEAD") == 6


def test_memory_is_bounded_by_the_budget(remote: Place, proxy: Proxy, s3_server: S3Server, tmp_path: Path) -> None:
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
    process = in_process(code, s3_server.endpoint_url, test, str(tmp_path / "copy"))
    before, downloaded, uploaded = map(int, process.communicate()[0].split())  # KiB
    assert downloaded - before < 40 * 1024
    assert uploaded - downloaded < 40 * 1024
    assert (tmp_path / "copy").stat().st_size == 512 * MIB


# --- uploads ------------------------------------------------------------------------------------------------------


def held(server: S3Server, remote: Place) -> bytes | None:
    """What the server has on its disk."""
    assert server.folder is not None
    path = server.folder.parent / remote.path
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("size", [1000, 17 * MIB])
def test_a_flipped_byte_in_an_upload_is_refused_and_sent_again(
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path, size: int
) -> None:
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    proxy.faults = [Fault(puts, 1, flip_request=500)]
    assert transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL) == [sha256(content)]
    assert held(s3_server, remote) == content
    # parts of 5 MiB; rclone now and then drops the whole upload for one part that it refused
    assert proxy.count(b"PUT") == 2 if size == 1000 else proxy.count(b"PUT") >= 5
    assert proxy.count(b"GET", b"/file ") == 0, "no read-back"


def test_an_upload_that_the_store_drops_is_begun_again_though_its_answer_is_lost(
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    content = os.urandom(11 * MIB)
    (tmp_path / "source").write_bytes(content)
    behind = place_at(s3_server.endpoint_url, "file", remote.path.split("/")[1])

    def drop(head: bytes) -> None:
        if puts(head) and proxy.count(b"PUT") == 2:
            writes = behind.verified_uploads
            assert writes is not None
            upload = writes.unfinished(behind.path)
            assert upload is not None
            writes.abandon(behind.path, upload)

    proxy.before_answer = drop
    proxy.faults = [Fault(lambda head: puts(head) and b"partNumber=2" in head, 8, lose_answer=True)]  # each attempt
    assert transfer.upload_many([(tmp_path / "source", remote)], budget=Budget(1, 5 * MIB)) == [sha256(content)]
    assert held(s3_server, remote) == content
    assert proxy.count(b"POST", b"uploads") == 2, "begun twice"


@pytest.mark.parametrize("size", [1000, 11 * MIB])
def test_an_upload_that_is_always_damaged_fails(
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path, size: int
) -> None:
    (tmp_path / "source").write_bytes(os.urandom(size))
    proxy.faults = [Fault(puts, 1000, flip_request=500)]
    # rclone drops a whole upload in parts after refusing some
    with pytest.raises(LlmftError, match=r"got other bytes than were sent|has dropped the unfinished upload"):
        transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL)
    assert held(s3_server, remote) is None


@pytest.mark.parametrize("fault", [Fault(puts, 2, status_503=True), Fault(puts, 1, hang=True)], ids=["503", "hang"])
def test_a_passing_fault_in_an_upload_is_outlived(
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT", 1)
    content = os.urandom(11 * MIB)
    (tmp_path / "source").write_bytes(content)
    proxy.faults = [fault]
    transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL)
    assert held(s3_server, remote) == content


def test_a_part_may_take_longer_than_a_connection(
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time-out is for a line on which nothing moves, not for a slow one."""
    monkeypatch.setattr(s3, "CONNECT_TIMEOUT", 2)
    content = os.urandom(16 * MIB)
    (tmp_path / "source").write_bytes(content)
    proxy.upload_rate = 2 * MIB
    transfer.upload_many([(tmp_path / "source", remote)], budget=Budget(concurrency=2, chunk=8 * MIB))
    assert held(s3_server, remote) == content
    assert proxy.count(b"PUT") == 2, "no part was sent twice"


def test_a_killed_upload_continues_in_another_process(
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    content = os.urandom(40 * MIB)
    (tmp_path / "source").write_bytes(content)
    code = "print(transfer.upload_many([(Path(arguments[0]), place)], budget=Budget(1, 5 * MIB))[0])"
    test = remote.path.split("/")[1]
    proxy.faults = [Fault(lambda head: puts(head) and b"partNumber=6" in head, 1, hang=True)]
    first = in_process(code, proxy.url, test, str(tmp_path / "source"))
    wait_for(lambda: proxy.count(b"PUT") == 6)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert held(s3_server, remote) is None
    second = in_process(code, proxy.url, test, str(tmp_path / "source"))
    assert second.communicate()[0].strip() == sha256(content)
    assert held(s3_server, remote) == content
    assert proxy.count(b"PUT") == 6 + 3, "parts 1 to 5 were there"


def test_parts_of_another_content_are_not_continued(
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(16 * MIB))
    proxy.faults = [Fault(lambda head: puts(head) and b"partNumber=4" in head, 1000, status_503=True)]
    with pytest.raises(LlmftError, match="keeps failing"):
        transfer.upload_many([(source, remote)], budget=Budget(1, 5 * MIB))
    proxy.faults, before = [], proxy.count(b"PUT")
    content = bytearray(source.read_bytes())
    content[7 * MIB] ^= 1  # in part 2
    source.write_bytes(content)
    transfer.upload_many([(source, remote)], budget=Budget(1, 5 * MIB))
    assert held(s3_server, remote) == content
    assert proxy.count(b"PUT") - before == 4, "all parts"


def test_an_upload_in_parts_costs_one_request_a_part_and_three_more(
    remote: Place, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    """Its parts' tags, and that of the whole, tell that all arrived: no part is sent twice, no size is asked for."""
    content = os.urandom(17 * MIB)
    (tmp_path / "source").write_bytes(content)
    transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL)
    assert held(s3_server, remote) == content
    assert [proxy.count(method) for method in (b"PUT", b"POST", b"GET", b"HEAD")] == [4, 2, 1, 0]


# --- create-if-absent ---------------------------------------------------------------------------------------------


def test_one_of_many_creates(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    for place in (
        place_at(moto_server.endpoint_url, "lease", "create"),
        Places(CATALOG, None, {}).place(str(tmp_path)) / "x",
    ):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda number, place=place: transfer.create(place, b"%d" % number), range(8)))
        assert won.count(True) == 1
        assert transfer.read_bytes(place) == b"%d" % won.index(True)


def test_who_cannot_create_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Places(CATALOG, None, {}).place(str(tmp_path)) / "x"
    monkeypatch.setattr(type(place.backend), "creates_exclusively", False)
    with pytest.raises(InputError, match="storage local cannot create a file only where none is there"):
        transfer.create(place, b"")


# --- the contract, on real servers --------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["rclone", "moto", "gcs"])
@pytest.mark.filterwarnings("ignore:Sending a large body directly with raw bytes:ResourceWarning")
class TestContract(StorageBackendContract):
    """The suite that strangers use."""

    @pytest.fixture
    def extension(self, server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
        running = request.getfixturevalue({"rclone": "s3_server", "moto": "moto_server", "gcs": "gcs_server"}[server])
        options = {"bucket": running.bucket, "endpoint-url": running.endpoint_url, "prefix": "contract"}
        if server == "gcs":
            return CATALOG.create("storage", {"name": "gcs", "anonymous": True, **options})
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        return CATALOG.create("storage", {"name": "s3", **options})
