"""Uploads by the transfer engine to real S3 servers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fault_proxy import Fault, Proxy
from s3_transfers import held, place_at, puts, storage_at
from servers import S3Server
from transfers import MIB, SMALL, in_process, kill_once, sha256

from llmft_core import LlmftError
from llmft_core.storage import transfer
from llmft_core.storage.engine import Budget
from llmft_core.storage.places import Place
from llmft_plugins.storage import s3


@pytest.mark.parametrize("size", [1000, 17 * MIB])
def test_a_flipped_byte_in_an_upload_is_refused_and_sent_again(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path, size: int
) -> None:
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    s3_proxy.faults = [Fault(puts, 1, flip_request=500)]
    assert transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL) == [sha256(content)]
    assert held(s3_server, remote) == content
    # parts of 5 MiB; rclone now and then drops the whole upload for one part that it refused
    assert s3_proxy.count(b"PUT") == 2 if size == 1000 else s3_proxy.count(b"PUT") >= 5
    assert s3_proxy.count(b"GET", b"/file ") == 0, "no read-back"


def test_an_upload_that_the_store_drops_is_begun_again_though_its_answer_is_lost(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path
) -> None:
    content = os.urandom(11 * MIB)
    (tmp_path / "source").write_bytes(content)
    behind = place_at(s3_server.endpoint_url, "file", remote.path.split("/")[1])

    def drop(head: bytes) -> None:
        if puts(head) and s3_proxy.count(b"PUT") == 2:
            writes = behind.verified_uploads
            assert writes is not None
            upload = writes.unfinished(behind.path)
            assert upload is not None
            writes.abandon(behind.path, upload)

    s3_proxy.before_answer = drop
    s3_proxy.faults = [Fault(lambda head: puts(head) and b"partNumber=2" in head, 8, lose_answer=True)]  # each attempt
    assert transfer.upload_many([(tmp_path / "source", remote)], budget=Budget(1, 5 * MIB)) == [sha256(content)]
    assert held(s3_server, remote) == content
    assert s3_proxy.count(b"POST", b"uploads") == 2, "begun twice"


@pytest.mark.parametrize("size", [1000, 11 * MIB])
def test_an_upload_that_is_always_damaged_fails(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path, size: int
) -> None:
    (tmp_path / "source").write_bytes(os.urandom(size))
    s3_proxy.faults = [Fault(puts, 1000, flip_request=500)]
    # rclone drops a whole upload in parts after refusing some
    with pytest.raises(LlmftError, match=r"got other bytes than were sent|has dropped the unfinished upload"):
        transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL)
    assert held(s3_server, remote) is None


@pytest.mark.parametrize("fault", [Fault(puts, 2, status_503=True), Fault(puts, 1, hang=True)], ids=["503", "hang"])
def test_a_passing_fault_in_an_upload_is_outlived(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT", 1)
    content = os.urandom(11 * MIB)
    (tmp_path / "source").write_bytes(content)
    s3_proxy.faults = [fault]
    transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL)
    assert held(s3_server, remote) == content


def test_a_part_may_take_longer_than_a_connection(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time-out is for a line on which nothing moves, not for a slow one."""
    monkeypatch.setattr(s3, "CONNECT_TIMEOUT", 2)
    content = os.urandom(16 * MIB)
    (tmp_path / "source").write_bytes(content)
    s3_proxy.upload_rate = 2 * MIB
    transfer.upload_many([(tmp_path / "source", remote)], budget=Budget(concurrency=2, chunk=8 * MIB))
    assert held(s3_server, remote) == content
    assert s3_proxy.count(b"PUT") == 2, "no part was sent twice"


def test_a_killed_upload_continues_in_another_process(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path
) -> None:
    content = os.urandom(40 * MIB)
    (tmp_path / "source").write_bytes(content)
    code = "print(transfer.upload_many([(Path(arguments[0]), place)], budget=Budget(1, 5 * MIB))[0])"
    test = remote.path.split("/")[1]
    s3_proxy.faults = [Fault(lambda head: puts(head) and b"partNumber=6" in head, 1, hang=True)]
    first = in_process(code, storage_at(s3_proxy.url, test), str(tmp_path / "source"))
    kill_once(first, lambda: s3_proxy.count(b"PUT") == 6, "part 6")
    assert held(s3_server, remote) is None
    second = in_process(code, storage_at(s3_proxy.url, test), str(tmp_path / "source"))
    assert second.communicate()[0].strip() == sha256(content)
    assert held(s3_server, remote) == content
    assert s3_proxy.count(b"PUT") == 6 + 3, "parts 1 to 5 were there"


def test_parts_of_another_content_are_not_continued(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(16 * MIB))
    s3_proxy.faults = [Fault(lambda head: puts(head) and b"partNumber=4" in head, 1000, status_503=True)]
    with pytest.raises(LlmftError, match="keeps failing"):
        transfer.upload_many([(source, remote)], budget=Budget(1, 5 * MIB))
    s3_proxy.faults, before = [], s3_proxy.count(b"PUT")
    content = bytearray(source.read_bytes())
    content[7 * MIB] ^= 1  # in part 2
    source.write_bytes(content)
    transfer.upload_many([(source, remote)], budget=Budget(1, 5 * MIB))
    assert held(s3_server, remote) == content
    assert s3_proxy.count(b"PUT") - before == 4, "all parts"


def test_an_upload_in_parts_costs_one_request_a_part_and_three_more(
    remote: Place, s3_server: S3Server, s3_proxy: Proxy, tmp_path: Path
) -> None:
    """Its parts' tags, and that of the whole, tell that all arrived: no part is sent twice, no size is asked for."""
    content = os.urandom(17 * MIB)
    (tmp_path / "source").write_bytes(content)
    transfer.upload_many([(tmp_path / "source", remote)], budget=SMALL)
    assert held(s3_server, remote) == content
    assert [s3_proxy.count(method) for method in (b"PUT", b"POST", b"GET", b"HEAD")] == [4, 2, 1, 0]
