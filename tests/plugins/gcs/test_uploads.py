"""Uploads over Google's protocol."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fault_proxy import Fault, Proxy
from gcs_transfers import composes, everything, reads, sends
from transfers import MIB, SMALL, sha256

from llmft_core import LlmftError
from llmft_core.storage import transfer
from llmft_core.storage.places import Place
from llmft_plugins.storage import gcs_client


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
