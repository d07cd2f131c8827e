"""A folder at a URI → a folder in this node's cache: fetched once, resumed after an interruption, verified."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.errors import InputError, LlmftError
from llmft_core.weights.cache import cache_folder, locked, read_cache_manifest, write_cache_manifest
from llmft_core.weights.files import Wanted, is_model_file

if TYPE_CHECKING:
    from llmft_core.storage.engine import Progress
    from llmft_core.storage.places import Place
    from llmft_core.weights.manifest import Manifest
    from llmft_core.weights.share import Sharer


@dataclass(frozen=True)
class Source:
    """A folder in storage, as a listing and its manifest describe it."""

    place: Place
    sizes: dict[str, int]
    """Relative path → bytes, of all files."""
    manifest: Manifest | None
    """What its writer promised, where it has one: mirrors of ours and checkpoints do."""
    versions: dict[str, str]
    """Relative path → what the store says of the content (ETag, generation, time); empty where it says nothing."""

    def digest(self) -> str:
        """SHA-256 (hex) of what all of the model's files hold, wherever they lie; empty where it is not known."""
        names = [name for name in self.sizes if is_model_file(name)]
        if self.manifest is None or not {*names} <= {*self.manifest.files}:
            return ""
        return hashlib.sha256(json.dumps([(name, self.manifest.files[name][1]) for name in names]).encode()).hexdigest()


def look(place: Place, origin: str) -> Source:
    """Lists a folder and reads its manifest. Raises InputError where the two do not agree: files are missing, of
    another size, or too many; or the copy was never finished."""
    from llmft_core.storage.transfer import list_versions
    from llmft_core.weights.manifest import MANIFEST, UNFINISHED, read_manifest

    listed = list_versions(place)
    sizes = {name: size for name, (size, _) in listed.items()}
    versions = {name: version for name, (_, version) in listed.items()}
    if MANIFEST not in sizes:
        if UNFINISHED in sizes:
            raise InputError(
                f"{origin}: {place.uri} is not complete, the copy to it was interrupted: run the same `llmft weights "
                "mirror` again, it continues"
            )
        return Source(place, sizes, None, versions)
    manifest = read_manifest(place / MANIFEST)
    if manifest is None:
        return Source(place, sizes, None, versions)
    again = "copy it there again (`llmft weights mirror`)"
    for name, (promised, _) in manifest.files.items():
        if not is_model_file(name):
            continue
        if name not in sizes:
            raise InputError(f"{origin}: {(place / name).uri} is missing, its manifest lists it; {again}")
        if sizes[name] != promised:
            raise InputError(
                f"{origin}: {(place / name).uri} has {sizes[name]} bytes, its manifest says {promised}; {again}"
            )
    beyond = sorted(name for name in sizes if is_model_file(name) and name not in manifest.files)
    if manifest.ours and beyond:
        raise InputError(
            f"{origin}: {(place / beyond[0]).uri} is not in the manifest beside it: somebody put it there; remove it, "
            f"or {again}"
        )
    return Source(place, sizes, manifest, versions)


def mirror(
    place: Place,
    origin: str,
    wanted: Wanted,
    *,
    source: Source | None = None,
    model: str = "",
    progress: Progress | None = None,
    sharer: Sharer | None = None,
) -> Path:
    """Fetch the wanted files of a folder into the cache, unless they are there. Returns the node-local folder.

    The folder's key holds the URI, the wanted files' sizes and what its manifest, else the store says of their content:
    what is overwritten at the source gets a new folder, and one that a running job maps is never touched. A file in the
    cache that was cut or changed since is fetched again. `source`: what `look` said; `model`: the hub id, for
    `llmft weights list`; `sharer`: this node's end of an exchange with others. Raises InputError where nothing wanted
    is there, LlmftError where a file is not what the source's manifest says.
    """
    source = source or look(place, origin)
    sizes = {name: size for name, size in sorted(source.sizes.items()) if wanted(name)}
    if not sizes:
        found = ", ".join(sorted(source.sizes)[:5]) or "nothing"
        raise InputError(f"{origin}: no file of a model there ({found}); check the URI, or `--model FOLDER`")
    root = cache_folder() / "mirror"
    root.mkdir(parents=True, exist_ok=True)
    promised = {name: sha256 for name, (_, sha256) in source.manifest.files.items()} if source.manifest else {}
    promised = {name: promised[name] for name in sizes if name in promised}
    versions = {name: source.versions[name] for name in sizes if name not in promised}
    key = hashlib.sha256(json.dumps([place.uri, sizes, promised, versions]).encode()).hexdigest()[:16]
    folder = root / f"{place.name or 'root'}-{key}"
    described = {"uri": place.uri, "model": model, "promised": {*promised} == {*sizes}}
    partial = folder.with_name(f"{folder.name}.partial")
    with locked(folder):
        if folder.is_dir():
            if _verified(folder, sizes):
                if sharer is not None:
                    sharer.begin(folder, folder, sizes, missing=[])
                return folder
            shutil.rmtree(partial, ignore_errors=True)
            os.replace(folder, partial)  # somebody removed, cut or changed a file in the cache; the others stay
        _fetch_all(place, partial, sizes, promised, described, progress, sharer)
        os.replace(partial, folder)
    return folder


def _fetch_all(
    place: Place,
    partial: Path,
    sizes: dict[str, int],
    promised: dict[str, str],
    described: dict[str, Any],
    progress: Progress | None,
    sharer: Sharer | None,
) -> None:
    """Into a folder that keeps what is complete, and half of what is large, so that a second attempt goes on where the
    first one ended. LlmftError where a file is not what was listed or promised."""
    from llmft_core.storage.transfer import download_many

    partial.mkdir(exist_ok=True)
    done = read_cache_manifest(partial).get("files", {})

    def note(path: Path, sha256: str) -> None:
        name, state = path.relative_to(partial).as_posix(), path.stat()
        if state.st_size != sizes[name]:
            path.unlink()
            raise LlmftError(
                f"{(place / name).uri}: {state.st_size} bytes arrived, but {sizes[name]} were listed: somebody writes "
                "there; try again"
            )
        done[name] = {"bytes": state.st_size, "sha256": sha256, "mtime_ns": state.st_mtime_ns}
        write_cache_manifest(partial, {**described, "files": done})

    missing = [name for name, size in sizes.items() if not _is_there(partial, name, size, done)]
    if sharer is not None:
        sharer.begin(partial.with_name(partial.name.removesuffix(".partial")), partial, sizes, missing)
    download_many(
        [(place / name, partial / name, promised.get(name)) for name in missing],
        done=note,
        progress=progress,
        exchange=sharer,
    )


def _verified(folder: Path, sizes: dict[str, int]) -> bool:
    done = read_cache_manifest(folder).get("files", {})
    return all(_is_there(folder, name, size, done) for name, size in sizes.items())


def _is_there(folder: Path, name: str, size: int, done: dict[str, Any]) -> bool:
    """Whether a file is as it was fetched: by its size and time, since 140 GB take minutes to read; one that was
    written since is read. What changes without a trace is for `llmft weights verify`."""
    path, noted = folder / name, done.get(name)
    if noted is None or not path.is_file():
        return False
    state = path.stat()
    if not state.st_size == noted["bytes"] == size:
        return False
    if state.st_mtime_ns == noted.get("mtime_ns"):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == str(noted["sha256"])
