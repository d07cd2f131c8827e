"""Objects on the real emulator of Google's storage, with or without a proxy before it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transfers import CATALOG, in_process

from llmft_core.extensions import VerifiedUploads
from llmft_core.storage import transfer
from llmft_core.storage.places import Place, Places


def storage_at(url: str, test: str) -> dict[str, Any]:
    """A plan's storage."""
    return {"name": "gcs", "bucket": "bucket", "endpoint-url": url, "prefix": test, "anonymous": True}


def folder_at(url: str, test: str) -> Place:
    return Places(CATALOG, storage_at(url, test), {}).runs()


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
    code = "print(transfer.upload_many([(Path(arguments[0]), place)], budget=Budget(1, int(arguments[1])))[0])"
    return in_process(code, storage_at(url, test), str(source), str(chunk))
