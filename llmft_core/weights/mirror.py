"""A folder at a URI → a folder in this node's cache: fetched once, resumed after an interruption, verified."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.errors import InputError, LlmftError
from llmft_core.weights.cache import cache_folder
from llmft_core.weights.files import Wanted

if TYPE_CHECKING:
    from llmft_core.storage.places import Place

MANIFEST = "manifest.json"


def mirror(place: Place, origin: str, wanted: Wanted) -> Path:
    """Fetch the wanted files of a folder into the cache, unless they are there. Returns the node-local folder.

    The folder's key holds the URI, the wanted files' sizes and, where the source has one (as our checkpoints do), its
    manifest: what is overwritten at the source gets a new folder, and one that a running job maps is never touched.
    Raises InputError where nothing wanted is there, LlmftError where a file is not what the source's manifest says.
    """
    from llmft_core.storage.transfer import list_files

    listed = list_files(place)  # relative path → bytes
    sizes = {name: size for name, size in sorted(listed.items()) if wanted(name)}
    if not sizes:
        found = ", ".join(sorted(listed)[:5]) or "nothing"
        raise InputError(f"{origin}: no file of a model there ({found}); check the URI, or `--model FOLDER`")
    root = cache_folder() / "mirror"
    root.mkdir(parents=True, exist_ok=True)
    promised = _source_manifest(place) if MANIFEST in listed else {}
    promised = {name: sha256 for name, sha256 in promised.items() if name in sizes}
    key = hashlib.sha256(json.dumps([place.uri, sizes, promised]).encode()).hexdigest()[:16]
    folder = root / f"{place.uri.rstrip('/').rsplit('/', 1)[-1] or 'root'}-{key}"
    with locked(folder):
        if folder.is_dir():
            if _verified(folder, sizes):
                return folder
            shutil.rmtree(folder)  # somebody removed or cut a file in the cache
        partial = folder.with_name(f"{folder.name}.partial")
        _fetch_all(place, partial, sizes, promised)
        os.replace(partial, folder)
    return folder


def _source_manifest(place: Place) -> dict[str, str]:
    """File → SHA-256 as a checkpoint's own manifest promises; {} where it is another kind of manifest."""
    from llmft_core.storage.transfer import read_bytes

    try:
        content = json.loads(read_bytes(place / MANIFEST))
    except ValueError:  # somebody else's file of that name
        return {}
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        return {}
    return {
        str(name): str(described["sha256"])
        for name, described in sorted(files.items())
        if isinstance(described, dict) and "sha256" in described
    }


def _fetch_all(place: Place, partial: Path, sizes: dict[str, int], promised: dict[str, str]) -> None:
    """Into a folder that keeps what is complete, and half of what is large, so that a second attempt goes on where the
    first one ended. LlmftError where a file is not what was listed or promised."""
    from llmft_core.storage.transfer import download_many

    partial.mkdir(exist_ok=True)
    done = _read_manifest(partial)

    def note(path: Path, sha256: str) -> None:
        name, arrived = path.relative_to(partial).as_posix(), path.stat().st_size  # bytes
        if arrived != sizes[name]:
            path.unlink()
            raise LlmftError(
                f"{(place / name).uri}: {arrived} bytes arrived, but {sizes[name]} were listed: somebody writes there; "
                "try again"
            )
        done[name] = {"bytes": arrived, "sha256": sha256}
        _write_manifest(partial, place.uri, done)

    missing = [name for name, size in sizes.items() if not _is_there(partial, name, size, done)]
    download_many([(place / name, partial / name, promised.get(name)) for name in missing], done=note)


def _verified(folder: Path, sizes: dict[str, int]) -> bool:
    done = _read_manifest(folder)
    return all(_is_there(folder, name, size, done) for name, size in sizes.items())


def _is_there(folder: Path, name: str, size: int, done: dict[str, Any]) -> bool:
    path = folder / name
    return name in done and path.is_file() and path.stat().st_size == done[name]["bytes"] == size


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    files: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else {}
    return files


def _write_manifest(folder: Path, uri: str, files: dict[str, Any]) -> None:
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps({"uri": uri, "files": files}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process of this node at a time makes a folder of the cache; the others wait and then find it."""
    from filelock import FileLock

    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield
