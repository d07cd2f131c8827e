"""Checkpoints that lie in storage: what is complete, what a manifest says, whether the bytes are still those."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft_core.checkpoint.publish import MARKER
from llmft_core.checkpoint.together import MANIFEST
from llmft_core.errors import InputError, LlmftError
from llmft_core.storage.check import check_files
from llmft_core.storage.places import Place, checked_name
from llmft_core.storage.transfer import download, download_many, exists, list_files, read_bytes

NAME = re.compile(r"checkpoint_\d{5,}")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder of a run. Without its marker it is incomplete, and nothing reads it."""

    run: str
    name: str
    place: Place
    bytes: int
    complete: bool


def list_checkpoints(root: Place) -> list[StoredCheckpoint]:
    """All checkpoint folders below a run, a folder of runs or a storage root, in order of their paths."""
    found: dict[str, dict[str, int]] = {}
    for path, size in list_files(root).items():
        parts = path.split("/")
        for depth, part in enumerate(parts[:-1]):
            if NAME.fullmatch(part):
                found.setdefault("/".join(parts[: depth + 1]), {})["/".join(parts[depth + 1 :])] = size
                break
    checkpoints = []
    for path, files in sorted(found.items()):
        run, _, name = path.rpartition("/")
        complete = MARKER in files
        checkpoints.append(StoredCheckpoint(run or root.name, name, root / path, sum(files.values()), complete))
    return checkpoints


def read_manifest(place: Place) -> dict[str, Any]:
    """The manifest of a complete checkpoint. Raises InputError where it is incomplete or none at all, LlmftError where
    the manifest is not the one that the marker vouches for."""
    if not exists(place / MARKER):
        raise InputError(
            f"{place.uri} is not a complete checkpoint (it has no {MARKER}): give a checkpoint_NNNNN folder, "
            "`llmft checkpoint list` shows which are complete"
        )
    return vouched_manifest(place, MARKER)


def vouched_manifest(place: Place, marker: str) -> dict[str, Any]:
    """The manifest of a complete folder. Raises LlmftError where it is not the one that the marker vouches for."""
    text = read_bytes(place / MANIFEST)
    try:
        promised = json.loads(read_bytes(place / marker))["manifest_sha256"]
        manifest: dict[str, Any] = json.loads(text)
        files = {checked_name(name): (int(d["bytes"]), str(d["sha256"])) for name, d in manifest["files"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise LlmftError(
            f"{place.uri}: {MANIFEST} or {marker} is damaged ({error}): do not use what is there"
        ) from None
    if hashlib.sha256(text).hexdigest() != promised or not files:
        raise LlmftError(f"{place.uri}: {MANIFEST} is not the one that {marker} vouches for: do not use what is there")
    return manifest


def verify_stored(place: Place) -> tuple[int, list[str]]:
    """Reads every byte of a checkpoint; (bytes read, what is wrong). Raises as `read_manifest` does."""
    manifest = read_manifest(place)
    promised = {
        name: (int(described["bytes"]), str(described["sha256"])) for name, described in manifest["files"].items()
    }
    read, wrong = check_files(place, promised)
    there = list_files(place)
    wrong += [f"{name}: is not in the manifest" for name in sorted({*there} - {*manifest["files"], MANIFEST, MARKER})]
    return read, wrong


def pull(place: Place, target: Path) -> int:
    """Fetch a complete checkpoint into a new folder, every file checked against the manifest; returns its bytes.

    The folder appears whole or not at all. Raises InputError where it exists already, LlmftError for a wrong byte.
    """
    if target.exists():
        raise InputError(f"{target} exists already: give a new folder")
    manifest = read_manifest(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        files = manifest["files"].items()
        download_many([(place / name, partial / name, described["sha256"]) for name, described in files])
        for name in (MANIFEST, MARKER):  # the marker last, here too
            download(place / name, partial / name)
        partial.chmod(0o755)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already where all went well
    return sum(int(described["bytes"]) for described in manifest["files"].values())
