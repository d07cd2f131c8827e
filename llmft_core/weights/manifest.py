"""What is written down of a model's files beside them: bytes and SHA-256, in mirrors, checkpoints and the cache."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft_core.errors import InputError
from llmft_core.storage.places import Place, checked_name
from llmft_core.storage.transfer import exists, read_bytes

MANIFEST = "manifest.json"
"""Written last: a mirror that has it was copied whole."""
UNFINISHED = "manifest.unfinished.json"
"""Written first by `llmft weights mirror`, and removed after the manifest: what is to come, and what is there."""
KIND = "llmft weights"


@dataclass(frozen=True)
class Manifest:
    """The files of a folder as their writer knew them."""

    files: dict[str, tuple[int, str]]
    """Relative path → (bytes, SHA-256 in hex)."""
    model: str = ""
    """Hub id or name under which it was mirrored."""
    ours: bool = False
    """Written by `llmft weights mirror`, and so of all files of the model; a checkpoint's, for instance, is not."""
    done: frozenset[str] = frozenset()
    """In an unfinished one: the files that were there already, verified."""

    def to_json(self) -> bytes:
        """As it is stored in a mirror."""
        files = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in sorted(self.files.items())}
        data: dict[str, Any] = {"kind": KIND, "model": self.model, "files": files}
        if self.done:
            data["done"] = sorted(self.done)
        return (json.dumps(data, indent=2) + "\n").encode()


def read_manifest(place: Place) -> Manifest | None:
    """The manifest at this place, which is a file; None where it is another kind of JSON. Raises InputError where it is
    damaged, or names a file outside of its folder."""
    again = "copy the model there again (`llmft weights mirror`), or remove this file"
    try:
        data = json.loads(read_bytes(place))
    except ValueError as error:  # not Unicode, too
        raise InputError(f"{place.uri} is not JSON ({error}): {again}") from error
    data = data if isinstance(data, dict) else {}
    described: Any = data.get("files")
    ours = data.get("kind") == KIND
    try:
        files = {
            checked_name(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in sorted(described.items())
        }
        done = frozenset(map(str, data.get("done", [])))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if ours:
            raise InputError(f"{place.uri} is damaged ({error!r}): {again}") from error
        return None
    return Manifest(files, str(data.get("model", "")), ours, done) if files else None


def known_hashes(place: Place) -> dict[str, tuple[int, str]]:
    """File → (bytes, SHA-256) of a model's files, as its manifest says, or as the hub's cache names them; {} where
    nothing is known. Raises InputError where the manifest is damaged."""
    if exists(place / MANIFEST):
        manifest = read_manifest(place / MANIFEST)
        return manifest.files if manifest is not None else {}
    if place.backend.scheme != "file" or not (folder := Path(place.path)).is_dir():
        return {}
    named = {path.name: (path.stat().st_size, path.resolve().name) for path in folder.iterdir() if path.is_symlink()}
    # The hub's cache keeps large files as blobs/SHA-256 and links to them.
    return {name: known for name, known in named.items() if re.fullmatch("[0-9a-f]{64}", known[1])}
