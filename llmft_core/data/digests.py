"""SHA-256 of the sources, remembered: a file that has not changed since it was hashed is not read again."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft_core.data.files import FileSource, GeneratedSource, is_uri, place_of

SETTLED = 2.0
"""Seconds a local file must have been left alone before its hash is remembered: within the resolution of the file
system's clock a second change would leave the same time."""


@dataclass(frozen=True)
class Digests:
    """The memory lies in `folder`, a small file for each place from which rows were read."""

    folder: Path

    def of(self, file: FileSource | GeneratedSource, *, again: bool) -> str:
        """The digest of a file's bytes: the remembered one where the file is said to be the same, by its file system
        (size, inode, times of change) or its store (size, and ETag or generation). `again`: read it all the same.

        Raises InputError where it cannot be read, OSError where the memory cannot be written."""
        if isinstance(file, GeneratedSource):
            return file.digest()
        before = _identity(file)
        if not before:
            return file.digest()
        place = hashlib.sha256(str(before["at"]).encode()).hexdigest()
        if not again and (known := self._known(place, before)):
            return known
        digest = file.digest()
        if before == _identity(file) and time.time() - before.get("changed", 0.0) > SETTLED:
            self._remember(place, {**before, "sha256": digest})
        return digest

    def _known(self, place: str, identity: dict[str, Any]) -> str:
        try:
            found = json.loads((self.folder / f"{place}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return ""
        digest = found.pop("sha256", "") if isinstance(found, dict) else ""
        return str(digest) if digest and found == identity else ""

    def _remember(self, place: str, facts: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{place}.{uuid.uuid4().hex}"
        draft.write_text(json.dumps(facts), encoding="utf-8")
        os.replace(draft, self.folder / f"{place}.json")


def _identity(file: FileSource) -> dict[str, Any]:
    """What tells a file from what it was before; empty where nothing does."""
    if is_uri(file.location):
        from llmft_core.storage.objects import Source

        source = Source(place_of(file.places, file.location))
        return {"at": file.location, "size": source.size, "version": source.version} if source.version else {}
    try:
        told = os.stat(file.location)
    except OSError as error:
        raise file.unreadable(error) from error
    return {
        "at": os.path.abspath(file.location),
        "size": told.st_size,
        "inode": [told.st_dev, told.st_ino],
        "modified": told.st_mtime_ns,
        "changed": told.st_ctime_ns / 1e9,  # no program can set it back, as it can the other
    }
