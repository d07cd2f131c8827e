"""The parts of an upload over Google's protocol: composed, continued, swept, and never mixed up."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import requests
from fault_proxy import Fault, Proxy
from gcs_transfers import composes, everything, folder_at, sends, sends_part, uploader, writes_of
from servers import GcsServer
from transfers import KIB, MIB, kill_once, sha256

from llmft_core import LlmftError
from llmft_core.storage import transfer
from llmft_core.storage.engine import Budget
from llmft_core.storage.places import Place
from llmft_plugins.storage import gcs_client, gcs_crc32c, gcs_objects


def test_a_killed_upload_continues_in_another_process(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, own_name: str
) -> None:
    content = os.urandom(8 * MIB)
    (tmp_path / "source").write_bytes(content)
    proxy.faults = [Fault(sends_part(6), 1, hang=True)]
    first = uploader(proxy.url, own_name, tmp_path / "source", MIB)
    kill_once(first, lambda: sum(map(sends, proxy.heads)) == 6, "part 6")
    assert transfer.list_files(folder_at(proxy.url, own_name)) == {}, "no listing of runs takes parts for files"
    assert len(everything(behind)) == 5
    second = uploader(proxy.url, own_name, tmp_path / "source", MIB)
    assert second.communicate()[0].strip() == sha256(content)
    assert transfer.read_bytes(behind) == content
    assert sum(map(sends, proxy.heads)) == 6 + 3, "parts 1 to 5 were there"
    assert everything(behind) == ["runs/file"]


def test_one_killed_while_it_composes_continues_too(
    remote: Place, behind: Place, proxy: Proxy, tmp_path: Path, own_name: str
) -> None:
    """40 parts become one piece of 32 and 8 parts, and then the file."""
    content = os.urandom(40 * 64 * KIB)
    (tmp_path / "source").write_bytes(content)
    proxy.faults = [Fault(lambda head: composes(head) and b"runs%2Ffile" in head, 1, hang=True)]
    first = uploader(proxy.url, own_name, tmp_path / "source", 64 * KIB)
    kill_once(
        first,
        lambda: any(composes(head) and b"runs%2Ffile" in head for head in proxy.heads),
        "composition of the file",
    )
    assert transfer.list_files(folder_at(proxy.url, own_name)) == {}
    assert any(name.endswith("/00001-00032") for name in everything(behind))
    before = len(proxy.heads)
    second = uploader(proxy.url, own_name, tmp_path / "source", 64 * KIB)
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
