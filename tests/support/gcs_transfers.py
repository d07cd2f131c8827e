"""Objects on the real emulator of Google's storage, with or without a proxy before it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from llmft_core.catalog import Catalog
from llmft_core.extensions import VerifiedUploads
from llmft_core.loading import load_plugins
from llmft_core.storage import transfer
from llmft_core.storage.places import Place, Places

CATALOG = Catalog(load_plugins())


def folder_at(url: str, test: str) -> Place:
    options = {"bucket": "bucket", "endpoint-url": url, "prefix": test, "anonymous": True}
    return Places(CATALOG, {"name": "gcs", **options}, {}).runs()


def writes_of(place: Place) -> VerifiedUploads:
    writes = place.verified_uploads
    assert writes is not None
    return writes


def everything(place: Place) -> list[str]:
    """All objects of this test, wherever they lie."""
    bucket, prefix, *_ = place.path.split("/")
    return list(transfer.list_files(Place(place.backend, f"{bucket}/{prefix}")))


def sends(head: bytes) -> bool:
    return head.startswith(b"POST /upload/")


def sends_part(number: int) -> Callable[[bytes], bool]:
    """Accepts the request that sends this part: its name ends so."""
    return lambda head: sends(head) and head.split(b" ", 2)[1].endswith(b"%%2F%05d" % number)


def composes(head: bytes) -> bool:
    return head.startswith(b"POST ") and b"/compose" in head.split(b"\r\n", 1)[0]


def reads(head: bytes) -> bool:
    return head.startswith(b"GET /download/")


def uploader(url: str, test: str, source: Path, chunk: int) -> subprocess.Popen[str]:
    """Uploads a file part by part in a process of its own, and prints its SHA-256."""
    code = f"""
        import sys
        from pathlib import Path
        from llmft_core.catalog import Catalog
        from llmft_core.loading import load_plugins
        from llmft_core.storage import transfer
        from llmft_core.storage.engine import Budget
        from llmft_core.storage.places import Places
        options = {{"bucket": "bucket", "endpoint-url": {url!r}, "prefix": {test!r}, "anonymous": True}}
        place = Places(Catalog(load_plugins()), {{"name": "gcs", **options}}, {{}}).runs() / "file"
        print(transfer.upload_many([(Path(sys.argv[1]), place)], budget=Budget(1, {chunk}))[0])
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(source)], stdout=subprocess.PIPE, text=True
    )
