"""Downloads from both stores, over a line that breaks them off or damages them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault
from stores import Store
from transfers import MIB, SMALL, sha256

from llmft_core import LlmftError
from llmft_core.storage import faults, transfer
from llmft_plugins.storage import gcs_client, s3


@pytest.fixture
def stored(store: Store, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """5 MiB and a bit, which are six ranges. Waits between attempts take no time from here on."""
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)
    content = os.urandom(5 * MIB + 17)
    transfer.write_bytes(store.folder / "file", content)
    return content


@pytest.mark.parametrize(
    ("fault", "times"),
    [({"reset_after": 1000}, 3), ({"truncate_after": 70_000}, 3), ({"status_503": True}, 3), ({"hang": True}, 1)],
    ids=["reset", "truncated", "503", "hang"],
)
def test_a_passing_fault_is_outlived(
    store: Store, stored: bytes, tmp_path: Path, fault: dict[str, Any], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "hang" in fault:
        monkeypatch.setattr({"s3": s3, "gcs": gcs_client}[store.name], "READ_TIMEOUT", 3)
    store.proxy.faults, before = [Fault(store.reads, times, **fault)], len(store.proxy.heads)
    transfer.download_many([(store.folder / "file", tmp_path / "copy", sha256(stored))], budget=SMALL)
    assert (tmp_path / "copy").read_bytes() == stored
    assert sum(map(store.reads, store.proxy.heads[before:])) == 6 + times


def test_a_flipped_byte_is_found_where_a_hash_is_expected(store: Store, stored: bytes, tmp_path: Path) -> None:
    store.proxy.faults = [Fault(store.reads, 1, flip_answer=500_000)]
    with pytest.raises(LlmftError, match=r"arrived, but .* were promised"):
        transfer.download_many([(store.folder / "file", tmp_path / "copy", sha256(stored))], budget=SMALL)
    assert list(tmp_path.iterdir()) == []
