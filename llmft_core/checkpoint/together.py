"""Several ranks publish one folder: each uploads its own files and describes them in a `manifest.part-K`; rank 0 waits
for all parts, merges them into the manifest and writes the marker. They meet in the storage, so that no collective runs
beside training.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmft_core.errors import LlmftError, one_line
from llmft_core.storage.engine import GRACE, SLOWEST
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import delete, exists, read_bytes, upload_many, write_bytes

MANIFEST = "manifest.json"
PART = "manifest.part-{rank}"
LOOK_EVERY = 0.5  # seconds between two looks for the other ranks' parts

Said = Mapping[str, Any]
"""What one rank says of its part, as JSON data: `files` (name → bytes and SHA-256), and what this kind of folder has
besides."""
MakeManifest = Callable[[Sequence[Said]], "dict[str, Any]"]
"""The manifest out of all parts, in order of ranks; raises LlmftError where they are not a whole."""


def upload_part(folder: Path, target: Place) -> dict[str, dict[str, Any]]:
    """Upload this rank's local files, verified; name → bytes and SHA-256. The folder is kept. Raises LlmftError."""
    files = {path.name: describe(path) for path in sorted(folder.iterdir())}
    sent = upload_many([(folder / name, target / name) for name in files])
    for (name, described), sha256 in zip(files.items(), sent, strict=True):
        if sha256 != described["sha256"]:
            raise LlmftError(f"{(target / name).uri} is not what was uploaded")
    return files


@contextmanager
def promised(target: Place, rank: int) -> Iterator[None]:
    """Around all that a rank does for its part: rank 0 waits for that, and hears of whatever fails, if the storage
    takes it."""
    try:
        yield
    except Exception as error:  # whatever it is, rank 0 waits for a word
        if rank != 0:
            with suppress(LlmftError):  # the first error says already what is wrong with the storage
                write_bytes(target / PART.format(rank=rank), json.dumps({"error": one_line(error)}).encode())
        raise


def send_part(
    folder: Path, target: Place, rank: int, check: Callable[[], None], said: Said, *, keep: bool = True
) -> None:
    """What a rank other than 0 does: `check` the local files, upload, tell rank 0 through the storage, remove them.

    Raises LlmftError if anything fails, naming the local folder where `keep` says that it is worth keeping.
    """
    try:
        check()
        described = {"files": upload_part(folder, target), **said}
        write_bytes(target / PART.format(rank=rank), json.dumps(described).encode())
    except Exception as error:
        failure = LlmftError(f"rank {rank}'s part of {target.uri} could not be published: {one_line(error)}")
        if keep:
            failure.add_note(f"the local copy is kept in {folder}")
        raise failure from error
    shutil.rmtree(folder)


def assemble(
    folder: Path,
    target: Place,
    writers: int,
    check: Callable[[], None],
    said: Said,
    make_manifest: MakeManifest,
    marker: str,
    way_out: str = "",
    *,
    keep: bool = True,
) -> int:
    """What rank 0 does: `check` and upload its part, wait for those of ranks 1 to `writers` - 1, write the manifest and
    then the marker, and remove the local folder. Returns the bytes uploaded by all.

    Raises LlmftError if anything fails, naming the local folder where `keep` says that it is worth keeping; `way_out`
    is what to do with it.
    """
    try:
        check()
        parts: list[Said] = [{"files": upload_part(folder, target), **said}]
        total = 4 * writers * sum(int(described["bytes"]) for described in parts[0]["files"].values())
        until = time.monotonic() + 2 * GRACE + total / SLOWEST
        parts += [await_part(target, rank, until) for rank in range(1, writers)]
        files = {name: dict(described) for part in parts for name, described in sorted(part["files"].items())}
        text = (json.dumps({"files": files, **make_manifest(parts)}, indent=2) + "\n").encode()
        write_bytes(target / MANIFEST, text)
        for rank in range(1, writers):
            delete(target / PART.format(rank=rank))
        vouched = {"manifest_sha256": hashlib.sha256(text).hexdigest()}
        write_bytes(target / marker, (json.dumps(vouched) + "\n").encode())
    except Exception as error:  # whatever it is, the local copy is worth naming
        kept = f"; the local copy is kept in {folder}{way_out}" if keep else ""
        raise LlmftError(f"{target.uri} could not be published: {one_line(error)}{kept}") from error
    shutil.rmtree(folder)
    return sum(int(described["bytes"]) for described in files.values())


def await_part(target: Place, rank: int, until: float) -> Said:
    """What another rank has uploaded, once it says so. `until` by `time.monotonic`. Raises LlmftError where that rank
    failed, or says nothing in time."""
    note = target / PART.format(rank=rank)
    while not exists(note):
        if time.monotonic() > until:
            raise LlmftError(f"rank {rank} has not uploaded its part in time")
        time.sleep(LOOK_EVERY)
    said: dict[str, Any] = json.loads(read_bytes(note))
    if "error" in said:
        raise LlmftError(said["error"])
    return said


def describe(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 (hex) of a local file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
