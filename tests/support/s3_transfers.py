"""Objects on the real S3 servers of the tests, with or without a proxy before them."""

from __future__ import annotations

from typing import Any

from servers import S3Server
from transfers import CATALOG

from llmft_core.storage import transfer
from llmft_core.storage.places import Place, Places


def storage_at(url: str, test: str) -> dict[str, Any]:
    """A plan's storage."""
    return {"name": "s3", "bucket": "bucket", "endpoint-url": url, "prefix": test}


def place_at(url: str, name: str, test: str) -> Place:
    return Places(CATALOG, storage_at(url, test), {}).runs() / name


def lay(server: S3Server, remote: Place, content: bytes) -> None:
    """Puts an object without the proxy."""
    prefix = remote.path.split("/")[1]
    transfer.write_bytes(place_at(server.endpoint_url, remote.name, prefix), content)


def held(server: S3Server, remote: Place) -> bytes | None:
    """What the server has on its disk."""
    assert server.folder is not None
    path = server.folder.parent / remote.path
    return path.read_bytes() if path.exists() else None


def gets(head: bytes) -> bool:
    return head.startswith(b"GET ")


def puts(head: bytes) -> bool:
    return head.startswith(b"PUT ")
