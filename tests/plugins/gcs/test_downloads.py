"""Downloads over Google's protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_proxy import Fault, Proxy, google_refusal
from gcs_transfers import reads
from transfers import MIB, SMALL, passing_faults, sha256

from llmft_core import ChangedMeanwhile, LlmftError
from llmft_core.storage import transfer
from llmft_core.storage.engine import Budget
from llmft_core.storage.places import Place
from llmft_plugins.storage import gcs_client


@passing_faults(reads)
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
