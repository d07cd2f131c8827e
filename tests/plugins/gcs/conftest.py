"""A file in the emulator of Google's storage, with a proxy before it that breaks things and counts requests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from fault_proxy import Proxy, fault_proxy
from gcs_transfers import folder_at
from servers import GcsServer
from transfers import MIB

from llmft_core.storage import faults, transfer
from llmft_core.storage.places import Place


@pytest.fixture
def proxy(gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before the emulator; waits between attempts take no time."""
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)
    with fault_proxy(gcs_server.endpoint_url) as running:
        yield running


@pytest.fixture
def remote(proxy: Proxy, own_name: str) -> Place:
    """A file through the proxy, of this test alone."""
    return folder_at(proxy.url, own_name) / "file"


@pytest.fixture
def behind(gcs_server: GcsServer, own_name: str) -> Place:
    """The same file, without the proxy."""
    return folder_at(gcs_server.endpoint_url, own_name) / "file"


@pytest.fixture
def stored(behind: Place) -> bytes:
    """5 MiB and a bit, laid there behind the proxy's back."""
    content = os.urandom(5 * MIB + 17)
    transfer.write_bytes(behind, content)
    return content
