"""Downloads over Google's protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_proxy import Fault, Proxy, google_refusal
from gcs_transfers import reads
from transfers import MIB

from llmft_core import ChangedMeanwhile, LlmftError
from llmft_core.storage import transfer
from llmft_core.storage.engine import Budget
from llmft_core.storage.places import Place


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
