"""Where this node keeps what it has fetched or made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE_MANIFEST = "manifest.json"
"""In each folder that came from storage, written by us: where its files come from, and their bytes and SHA-256."""


def cache_folder() -> Path:
    """`LLMFT_CACHE`, or `~/.cache/llmft`. It need not exist yet."""
    return Path(os.environ.get("LLMFT_CACHE") or "~/.cache/llmft").expanduser().absolute()


def read_cache_manifest(folder: Path) -> dict[str, Any]:
    """What was written down of a folder of the cache; {} where nothing was."""
    path = folder / CACHE_MANIFEST
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def write_cache_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write it down: who reads meanwhile finds the one before, or this one whole."""
    temporary = folder / f".{CACHE_MANIFEST}"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / CACHE_MANIFEST)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process of this node at a time makes a folder of the cache; the others wait and then find it."""
    from filelock import FileLock

    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield
