"""Objects on the real S3 servers of the tests, with or without a proxy before them."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from servers import S3Server

from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.storage import transfer
from llmft_core.storage.places import Place, Places

CATALOG = Catalog(load_plugins())


def place_at(url: str, name: str, test: str) -> Place:
    options = {"bucket": "bucket", "endpoint-url": url, "prefix": test}
    return Places(CATALOG, {"name": "s3", **options}, {}).runs() / name


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


def in_process(code: str, url: str, test: str, *arguments: str) -> subprocess.Popen[str]:
    """Runs code in a fresh process, with `place`, `transfer`, `Budget`, `MIB` and `arguments` at hand."""
    start = f"""
        import resource, sys, os
        from pathlib import Path
        from llmft_core.catalog import Catalog
        from llmft_core.loading import load_plugins
        from llmft_core.storage import transfer
        from llmft_core.storage.engine import Budget
        from llmft_core.storage.places import Places
        MIB = 2**20
        arguments = sys.argv[1:]
        options = {{"bucket": "bucket", "endpoint-url": {url!r}, "prefix": {test!r}}}
        place = Places(Catalog(load_plugins()), {{"name": "s3", **options}}, {{}}).runs() / "file"
    """
    program = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
