"""A model's folder on this node → a folder in a mirror: verified, continued after an interruption, manifest last."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from llmft_core.errors import InputError, LlmftError
from llmft_core.storage.engine import Progress
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import delete, exists, list_files, upload, upload_many, write_bytes
from llmft_core.weights.files import is_model_file
from llmft_core.weights.manifest import MANIFEST, UNFINISHED, Manifest, known_hashes, read_manifest


@dataclass(frozen=True)
class Published:
    """What became of a copy to a mirror."""

    bytes: int
    """Of the whole model."""
    files: int
    sent: int
    """Bytes that were uploaded now; the others were there."""


def publish(folder: Path, local: Place, target: Place, model: str, progress: Progress | None = None) -> Published:
    """Copy the model's files (those that staging would fetch, and no others) to `target`, then the manifest. `local` is
    `folder` as a place.

    What an earlier call has brought is not sent again. Raises InputError where something else lies at `target`,
    LlmftError where a local file is not what its source promised, or the upload fails.
    """
    check_target(target)
    manifest = Manifest(_described(folder, local), model, ours=True)
    there = list_files(target)
    done = _done(target, there, manifest)
    todo = [name for name in manifest.files if name not in done]
    if MANIFEST not in there:
        write_bytes(target / UNFINISHED, replace(manifest, done=frozenset(done)).to_json())

    def note(path: Path, sha256: str) -> None:
        if sha256 != manifest.files[path.name][1]:
            raise LlmftError(f"{path} was changed while it was uploaded: run it again once nobody writes there")
        done.add(path.name)
        if MANIFEST not in there:
            write_bytes(target / UNFINISHED, replace(manifest, done=frozenset(done)).to_json())

    upload_many([(folder / name, target / name) for name in todo], progress=progress, done=note)
    if MANIFEST not in there:
        with tempfile.TemporaryDirectory(prefix="llmft-manifest-") as scratch:
            (Path(scratch) / MANIFEST).write_bytes(manifest.to_json())
            upload(Path(scratch) / MANIFEST, target / MANIFEST)
    if MANIFEST not in there or UNFINISHED in there:
        delete(target / UNFINISHED)
    sizes = {name: size for name, (size, _) in manifest.files.items()}
    return Published(sum(sizes.values()), len(sizes), sum(sizes[name] for name in todo))


def _described(folder: Path, local: Place) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of the model's files. LlmftError where one is not what is known of it."""
    known = known_hashes(local)
    described = {}
    for path in sorted(folder.iterdir()):
        if not is_model_file(path.name) or not path.is_file():
            continue
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if path.name in known and known[path.name][1] != sha256:
            raise LlmftError(
                f"{path} is damaged: its bytes are not those that were fetched: remove it, fetch the model again, and "
                "nothing was copied"
            )
        described[path.name] = (path.stat().st_size, sha256)
    return described


def _done(target: Place, there: dict[str, int], manifest: Manifest) -> set[str]:
    """The files at the target that need not be sent again. InputError where what lies there is something else."""
    if MANIFEST in there:
        found = read_manifest(target / MANIFEST)
        if found is None or found.files != manifest.files:
            raise InputError(
                f"{target.uri} holds another complete model: remove it first, or choose another place or name (--as)"
            )
        return {name for name, (size, _) in found.files.items() if there.get(name) == size}
    if UNFINISHED in there:
        found = read_manifest(target / UNFINISHED)
        if found is None or found.files != manifest.files:
            raise InputError(
                f"{target.uri} holds the beginning of another copy: remove it first, or choose another place or name "
                "(--as)"
            )
        return {name for name in found.done if there.get(name) == found.files[name][0]}
    return set()


def check_mirror(root: Place) -> None:
    """InputError where a mirror is a model itself: one inside of another would be found by nobody."""
    for name in ("config.json", UNFINISHED):
        if exists(root / name):
            raise InputError(f"{root.uri} is a model's own folder (it has {name}), no mirror: give the folder above it")


def check_target(target: Place) -> None:
    """InputError where files lie at the target that no copy of ours has brought: seen before anything is fetched."""
    there = list_files(target)
    if there and MANIFEST not in there and UNFINISHED not in there:
        listing = ", ".join(sorted(there)[:4]) + (", …" if len(there) > 4 else "")
        raise InputError(
            f"{target.uri} holds files that no manifest of llmft describes ({listing}): remove them first, or choose "
            "another place or name (--as)"
        )
