"""A file in rclone's S3, with a proxy between that breaks things and counts bytes."""

from __future__ import annotations

import os

import pytest
from fault_proxy import Proxy
from s3_transfers import lay, place_at
from servers import S3Server
from transfers import MIB

from llmft_core.storage.places import Place


@pytest.fixture
def remote(s3_proxy: Proxy, own_name: str) -> Place:
    """A place through the proxy, of this test alone."""
    return place_at(s3_proxy.url, "file", own_name)


@pytest.fixture
def stored(remote: Place, s3_server: S3Server) -> bytes:
    """5 MiB and a bit, laid there behind the proxy's back."""
    content = os.urandom(5 * MIB + 17)
    lay(s3_server, remote, content)
    return content
