"""Transfers to and from Google's protocol, with a proxy before the emulator that breaks things and counts requests."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import requests
from fault_proxy import Fault, Proxy, fault_proxy, google_refusal
from hypothesis import given
from hypothesis import strategies as st
from servers import GcsServer

from llmft_core import ChangedMeanwhile, LlmftError
from llmft_core.catalog import Catalog
from llmft_core.extensions import VerifiedUploads
from llmft_core.loading import load_plugins
from llmft_core.storage import faults, transfer
from llmft_core.storage.engine import Budget
from llmft_core.storage.places import Place, Places
from llmft_plugins.storage import gcs_client, gcs_crc32c, gcs_objects

CATALOG = Catalog(load_plugins())
KIB, MIB = 2**10, 2**20
SMALL = Budget(concurrency=4, chunk=MIB)

# aiohttp says so of every upload by gcsfs above 1 MiB; outside of tests Python does not show it.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly with raw bytes:ResourceWarning")


def folder_at(url: str, test: str) -> Place:
    options = {"bucket": "bucket", "endpoint-url": url, "prefix": test, "anonymous": True}
    return Places(CATALOG, {"name": "gcs", **options}, {}).runs()


@pytest.fixture
def node_name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name).replace("[", "-").replace("]", "")


@pytest.fixture
def proxy(gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before the emulator; waits between attempts take no time."""
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)
    with fault_proxy(gcs_server.endpoint_url) as running:
        yield running


@pytest.fixture
def remote(proxy: Proxy, node_name: str) -> Place:
    """A file through the proxy, of this test alone."""
    return folder_at(proxy.url, node_name) / "file"


@pytest.fixture
def behind(gcs_server: GcsServer, node_name: str) -> Place:
    """The same file, without the proxy."""
    return folder_at(gcs_server.endpoint_url, node_name) / "file"


@pytest.fixture
def stored(behind: Place) -> bytes:
    """5 MiB and a bit, laid there behind the proxy's back."""
    content = os.urandom(5 * MIB + 17)
    transfer.write_bytes(behind, content)
    return content


def writes_of(place: Place) -> VerifiedUploads:
    writes = place.verified_uploads
    assert writes is not None
    return writes


def everything(place: Place) -> list[str]:
    """All objects of this test, wherever they lie."""
    bucket, prefix, *_ = place.path.split("/")
    return list(transfer.list_files(Place(place.backend, f"{bucket}/{prefix}")))


def sends(head: bytes) -> bool:
    return head.startswith(b"POST /upload/")


def sends_part(number: int) -> Callable[[bytes], bool]:
    """Accepts the request that sends this part: its name ends so."""
    return lambda head: sends(head) and head.split(b" ", 2)[1].endswith(b"%%2F%05d" % number)


def composes(head: bytes) -> bool:
    return head.startswith(b"POST ") and b"/compose" in head.split(b"\r\n", 1)[0]


def reads(head: bytes) -> bool:
    return head.startswith(b"GET /download/")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def uploader(url: str, test: str, source: Path, chunk: int) -> subprocess.Popen[str]:
    """Uploads a file part by part in a process of its own, and prints its SHA-256."""
    code = f"""
        import sys
        from pathlib import Path
        from llmft_core.catalog import Catalog
        from llmft_core.loading import load_plugins
        from llmft_core.storage import transfer
        from llmft_core.storage.engine import Budget
        from llmft_core.storage.places import Places
        options = {{"bucket": "bucket", "endpoint-url": {url!r}, "prefix": {test!r}, "anonymous": True}}
        place = Places(Catalog(load_plugins()), {{"name": "gcs", **options}}, {{}}).runs() / "file"
        print(transfer.upload_many([(Path(sys.argv[1]), place)], budget=Budget(1, {chunk}))[0])
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(source)], stdout=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


# --- checksums ----------------------------------------------------------------------------------------------------


@given(st.binary(), st.binary(max_size=3000))
def test_the_checksum_of_a_concatenation(one: bytes, other: bytes) -> None:
    first, second = (gcs_crc32c.crc32c(memoryview(each)) for each in (one, other))
    assert gcs_crc32c.joined(first, second, len(other)) == gcs_crc32c.crc32c(memoryview(one + other))


def test_the_checksum_is_google_s() -> None:
    """RFC 3720, B.4: 32 bytes of zeros, and 0 to 31."""
    assert gcs_crc32c.crc32c(memoryview(bytes(32))) == 0x8A9136AA
    assert gcs_crc32c.crc32c(memoryview(bytearray(range(32)))) == 0x46DD794E
    assert gcs_crc32c.decoded(gcs_crc32c.encoded(0x8A9136AA)) == 0x8A9136AA


# --- uploads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1000, 5 * MIB + 17], ids=["empty", "small", "parts"])
def test_what_lies_there_is_what_was_sent(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, size: int
) -> None:
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    assert transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL) == [sha256(content)]
    assert transfer.read_bytes(behind) == content
    assert sum(map(sends, proxy.heads)) == (6 if size > MIB else 1)
    assert sum(map(reads, proxy.heads)) == 0, "no read-back"
    assert everything(behind) == ["runs/file"], "no part stays"


@pytest.mark.parametrize("size", [1000, 5 * MIB], ids=["small", "parts"])
def test_a_flipped_byte_is_refused_and_sent_again(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, size: int
) -> None:
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    proxy.faults = [Fault(sends, 1, flip_request=900)]  # behind 400 bytes that say what it is
    transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL)
    assert transfer.read_bytes(behind) == content
    assert sum(map(sends, proxy.heads)) == 1 + -(-size // MIB)


@pytest.mark.parametrize("size", [1000, 3 * MIB], ids=["small", "parts"])
def test_an_upload_that_is_always_damaged_fails(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, size: int
) -> None:
    (tmp_path / "source").write_bytes(os.urandom(size))
    proxy.faults = [Fault(sends, 1000, flip_request=900)]
    with pytest.raises(LlmftError, match=r"got other bytes than were sent .* damages data: check"):
        transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL)
    assert everything(behind) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(sends, 2, status_503=True),
        Fault(sends, 1, hang=True),
        Fault(sends, 2, lose_answer=True),
        Fault(composes, 2, status_503=True),
        Fault(composes, 1, lose_answer=True),
        Fault(lambda head: head.startswith(b"DELETE "), 2, status_503=True),
        Fault(lambda head: head.startswith(b"DELETE "), 2, lose_answer=True),
    ],
    ids=["503", "hang", "lost", "compose-503", "compose-lost", "delete-503", "delete-lost"],
)
def test_a_passing_fault_in_an_upload_is_outlived(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs_client, "READ_TIMEOUT", 2)
    content = os.urandom(5 * MIB)
    (tmp_path / "source").write_bytes(content)
    proxy.faults = [fault]
    transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL)
    assert fault.times == 0
    assert transfer.read_bytes(behind) == content
    assert sum(map(reads, proxy.heads)) == 0, "no read-back"
    assert everything(behind) == ["runs/file"]


@pytest.mark.parametrize("content", [b"", b"\r", b"one\r", b"one\n", b"\r\n--", bytes(range(256))])
def test_small_files_lie_there_as_they_were_written(behind: Place, content: bytes) -> None:
    """gcsfs ends its body with a bare line feed, which swallows a carriage return before it."""
    transfer.write_bytes(behind, content)
    assert transfer.read_bytes(behind) == content


def test_a_killed_upload_continues_in_another_process(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, node_name: str
) -> None:
    content = os.urandom(8 * MIB)
    (tmp_path / "source").write_bytes(content)
    proxy.faults = [Fault(sends_part(6), 1, hang=True)]
    first = uploader(proxy.url, node_name, tmp_path / "source", MIB)
    wait_for(lambda: sum(map(sends, proxy.heads)) == 6)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert transfer.list_files(folder_at(proxy.url, node_name)) == {}, "no listing of runs takes parts for files"
    assert len(everything(behind)) == 5
    second = uploader(proxy.url, node_name, tmp_path / "source", MIB)
    assert second.communicate()[0].strip() == sha256(content)
    assert transfer.read_bytes(behind) == content
    assert sum(map(sends, proxy.heads)) == 6 + 3, "parts 1 to 5 were there"
    assert everything(behind) == ["runs/file"]


def test_one_killed_while_it_composes_continues_too(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, node_name: str
) -> None:
    """40 parts become one piece of 32 and 8 parts, and then the file."""
    content = os.urandom(40 * 64 * KIB)
    (tmp_path / "source").write_bytes(content)
    proxy.faults = [Fault(lambda head: composes(head) and b"runs%2Ffile" in head, 1, hang=True)]
    first = uploader(proxy.url, node_name, tmp_path / "source", 64 * KIB)
    wait_for(lambda: any(composes(head) and b"runs%2Ffile" in head for head in proxy.heads))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert transfer.list_files(folder_at(proxy.url, node_name)) == {}
    assert any(name.endswith("/00001-00032") for name in everything(behind))
    before = len(proxy.heads)
    second = uploader(proxy.url, node_name, tmp_path / "source", 64 * KIB)
    assert second.communicate()[0].strip() == sha256(content)
    assert transfer.read_bytes(behind) == content
    assert sum(map(sends, proxy.heads[before:])) == 0, "all parts were there"
    assert sum(map(composes, proxy.heads[before:])) == 1, "and what had been made of them"
    assert everything(behind) == ["runs/file"]


def test_many_parts_are_composed_in_a_tree(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 parts, three at once: pieces of 3, 3, 3 and 2, then of 9 and 2, then the file."""
    monkeypatch.setattr(gcs_objects, "COMPOSED_AT_ONCE", 3)
    content = os.urandom(11 * 4 * KIB - 5)
    (tmp_path / "source").write_bytes(content)
    transfer.upload_many([(tmp_path / "source", remote)], budget=Budget(2, 4 * KIB))
    assert transfer.read_bytes(behind) == content
    made = sorted(
        head.split(b"/compose", 1)[0].rpartition(b"%2F")[2].decode() for head in proxy.heads if composes(head)
    )
    assert made == ["00001-00003", "00001-00009", "00004-00006", "00007-00009", "00010-00011", "file"]
    assert everything(behind) == ["runs/file"]


def test_an_upload_whose_file_is_there_already_is_complete(behind: Place, proxy: Proxy, remote: Place) -> None:
    """As Google leaves it where the last answer was lost: the parts went with the composition."""
    parts = [b"a" * 1000, b"b" * 10]
    writes = writes_of(behind)
    upload = writes.begin(behind.path)
    tags = [writes.put_part(behind.path, upload, number, memoryview(part)) for number, part in enumerate(parts, 1)]
    writes.complete(behind.path, upload, tags)
    writes.complete(behind.path, upload, tags)
    assert transfer.read_bytes(behind) == b"".join(parts)
    with pytest.raises(FileNotFoundError, match="no longer there"):
        writes.complete(behind.path, "another", tags)


def test_uploads_at_once_do_not_mix(behind: Place) -> None:
    """Of two writers of one file the last to complete has it, whole."""
    writes = writes_of(behind)
    contents = [[b"1" * 100, b"2" * 100], [b"3" * 100, b"4" * 100]]
    uploads = [writes.begin(behind.path) for _ in contents]
    tags: list[list[str]] = [[], []]
    for number in (1, 2):
        for index, upload in enumerate(uploads):
            part = memoryview(contents[index][number - 1])
            tags[index].append(writes.put_part(behind.path, upload, number, part))
    for index, upload in enumerate(uploads):
        writes.complete(behind.path, upload, tags[index])
        assert transfer.read_bytes(behind) == b"".join(contents[index])
    assert everything(behind) == ["runs/file"]


def test_parts_of_another_content_are_not_continued(remote: Place, behind: Place, proxy: Proxy, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(4 * MIB))
    proxy.faults = [Fault(sends_part(4), 1000, status_503=True)]
    with pytest.raises(LlmftError, match="keeps failing"):
        transfer.upload_many([(source, remote)], budget=Budget(1, MIB))
    proxy.faults, before = [], len(proxy.heads)
    content = bytearray(source.read_bytes())
    content[MIB + 1] ^= 1  # in part 2
    source.write_bytes(content)
    transfer.upload_many([(source, remote)], budget=Budget(1, MIB))
    assert transfer.read_bytes(behind) == content
    assert sum(map(sends, proxy.heads[before:])) == 4, "all parts"


def test_parts_that_nobody_continues_are_swept(behind: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same file, once they are old; never another's."""
    writes, other = writes_of(behind), Place(behind.backend, f"{behind.path}-other")
    for place in (behind, other):
        writes.put_part(place.path, writes.begin(place.path), 1, memoryview(b"part"))
    writes.begin(behind.path)
    assert len(everything(behind)) == 2, "young ones stay"
    monkeypatch.setattr(gcs_objects, "STALE", timedelta(0))
    writes.begin(behind.path)
    assert writes.unfinished(behind.path) is None
    assert writes.unfinished(other.path) is not None


def test_a_part_that_somebody_replaced_is_not_made_part_of_the_file(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, gcs_server: GcsServer
) -> None:
    """The listing before the composition tells another content."""
    (tmp_path / "source").write_bytes(os.urandom(3 * MIB))

    def replace(head: bytes) -> None:
        if head.startswith(b"GET ") and b"prefix=" in head and sum(map(sends, proxy.heads)) == 3:
            proxy.before_answer = None
            writes = writes_of(behind)
            upload = writes.unfinished(behind.path)
            assert upload is not None
            writes.put_part(behind.path, upload, 2, memoryview(bytes(MIB)))

    proxy.before_answer = replace
    with pytest.raises(LlmftError, match="no such object"):
        transfer.upload_many([(tmp_path / "source", remote)], budget=Budget(1, MIB))
    assert transfer.list_files(folder_at(gcs_server.endpoint_url, remote.path.split("/")[1])) == {}


def test_a_composition_of_other_bytes_is_refused_by_the_store(behind: Place, gcs_server: GcsServer) -> None:
    client = gcs_client.GcsClient(requests.Session(), gcs_server.endpoint_url)
    one = memoryview(b"one")
    client.insert(behind.path, one, gcs_client.Checksums.of(one))
    source = {"name": behind.path.removeprefix("bucket/"), "generation": client.look(behind.path)["generation"]}
    with pytest.raises(gcs_client.DamagedOnTheWay, match="CRC32C"):
        client.compose(f"{behind.path}-two", [source, source], gcs_crc32c.crc32c(one), {})
    assert everything(behind) == ["runs/file"]


# --- downloads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(reads, 3, reset_after=1000),
        Fault(reads, 3, truncate_after=70_000),
        Fault(reads, 3, status_503=True),
        Fault(reads, 1, hang=True),
    ],
    ids=["reset", "truncated", "503", "hang"],
)
def test_a_passing_fault_in_a_download_is_outlived(
    remote: Place, stored: bytes, proxy: Proxy, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault.hang:
        monkeypatch.setattr(gcs_client, "READ_TIMEOUT", 3)
    times = fault.times
    proxy.faults = [fault]
    transfer.download_many([(remote, tmp_path / "copy", sha256(stored))], budget=SMALL)
    assert (tmp_path / "copy").read_bytes() == stored
    assert sum(map(reads, proxy.heads)) == 6 + times


def test_a_flipped_byte_in_a_download_is_found_where_a_hash_is_expected(
    remote: Place, stored: bytes, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.faults = [Fault(reads, 1, flip_answer=500_000)]
    with pytest.raises(LlmftError, match=r"arrived, but .* were promised"):
        transfer.download_many([(remote, tmp_path / "copy", sha256(stored))], budget=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", ["by the emulator", "by Google"])
def test_an_object_replaced_between_chunks_is_found(
    remote: Place, behind: Place, stored: bytes, proxy: Proxy, tmp_path: Path, told: str
) -> None:
    """Google answers 412 to the condition; the emulator ignores it, and is asked what is there."""
    if told == "by Google":
        proxy.faults = [
            Fault(
                lambda head: reads(head) and b"bytes=3145728" in head,
                1,
                answer=google_refusal("412 Precondition Failed", "changed"),
            )
        ]
    else:

        def replace(head: bytes) -> None:
            if reads(head) and sum(map(reads, proxy.heads)) == 3:
                transfer.write_bytes(behind, bytes(len(stored)))

        proxy.before_answer = replace
    with pytest.raises(ChangedMeanwhile, match="was changed while it was downloaded"):
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=Budget(1, MIB))
    assert not (tmp_path / "copy").exists()


def test_a_server_that_ignores_ranges_is_found_out(remote: Place, stored: bytes, proxy: Proxy, tmp_path: Path) -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nwhole"
    proxy.faults = [Fault(lambda head: reads(head) and b"bytes=0-" not in head, 1000, answer=whole)]
    with pytest.raises(LlmftError, match="came where a range was asked for"):
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=Budget(1, MIB))
    assert not (tmp_path / "copy").exists()
