"""Which models this node's cache or a mirror holds, whether they are whole, and whether their bytes are still right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, LlmftError
from llmft_core.storage.check import check_files
from llmft_core.storage.engine import Progress
from llmft_core.storage.places import Place, Places
from llmft_core.storage.transfer import list_files, list_names, read_bytes
from llmft_core.weights.cache import cache_folder, read_cache_manifest
from llmft_core.weights.files import INDEX, is_model_file, is_weight_file
from llmft_core.weights.hub import cache as hub_cache
from llmft_core.weights.layout import HUB, LONGEST_COMMIT, models_in
from llmft_core.weights.manifest import MANIFEST, UNFINISHED, known_hashes, read_manifest
from llmft_core.weights.stage import built_folder

COMPLETE, SMALL, INCOMPLETE, DAMAGED = "complete", "no weights", "INCOMPLETE", "DAMAGED"


@dataclass(frozen=True)
class Held:
    """A model in a mirror or in the cache."""

    model: str
    place: Place
    state: str
    bytes: int
    files: int
    hashes: str
    """Where its SHA-256 come from: the source's manifest, noted at first sight, the hub; or none."""


def in_mirror(root: Place) -> list[Held]:
    """The models in a mirror, by name. One listing, and a request for each manifest, index and refs/main."""
    files = list_files(root)
    commits = {}
    for path in files:
        if path.startswith(HUB) and path.split("/")[1:] == ["refs", "main"]:
            commits[path.split("/")[0]] = _commit(root / path)
    if root.name.startswith(HUB) and "refs/main" in files:  # the mirror is one model's folder of the hub cache
        prefix = f"{root.name}/"
        laid = models_in(root, [prefix + path for path in files], {root.name: _commit(root / "refs/main")})
        return [_held(found.model, root, found.folder.removeprefix(prefix), files) for found in laid]
    return [_held(found.model, root, found.folder, files) for found in models_in(root, files, commits)]


def _commit(ref: Place) -> str:
    return read_bytes(ref, LONGEST_COMMIT).decode("ascii", "replace").strip()


def _held(model: str, root: Place, folder: str, files: dict[str, int]) -> Held:
    place = root / folder if folder else root
    prefix = f"{folder}/" if folder else ""
    own = {path.removeprefix(prefix): size for path, size in files.items() if path.startswith(prefix)}
    sizes = {name: size for name, size in own.items() if is_model_file(name)}
    try:
        state = _state(place, own)
    except (InputError, ValueError, KeyError, TypeError, AttributeError):  # a manifest or an index that is none
        state = DAMAGED
    return Held(model, place, state, sum(sizes.values()), len(sizes), "manifest" if MANIFEST in own else "none")


def _state(place: Place, own: dict[str, int]) -> str:
    manifest = read_manifest(place / MANIFEST) if MANIFEST in own else None
    if manifest is not None:
        promised = {name: size for name, (size, _) in manifest.files.items() if is_model_file(name)}
        return COMPLETE if promised.items() <= own.items() else INCOMPLETE
    if UNFINISHED in own:
        return INCOMPLETE
    if not any(is_weight_file(name) and name != INDEX for name in own):
        return SMALL
    shards = json.loads(read_bytes(place / INDEX))["weight_map"].values() if INDEX in own else ()
    return COMPLETE if {*shards} <= {*own} else INCOMPLETE


def in_cache(catalog: Catalog, places: Places) -> list[Held]:
    """What this node holds: fetched from mirrors and URIs, made by families, and in the hub's own cache."""
    found = []
    fetched = cache_folder() / "mirror"
    for folder in sorted(path for path in fetched.iterdir() if path.is_dir()) if fetched.is_dir() else ():
        content = read_cache_manifest(folder)
        files = content.get("files", {})
        there = {name: (folder / name).stat().st_size for name in files if (folder / name).is_file()}
        if folder.name.endswith(".partial"):
            state = INCOMPLETE
        elif there != {name: facts["bytes"] for name, facts in files.items()}:
            state = DAMAGED
        else:
            state = COMPLETE if any(map(is_weight_file, files)) else SMALL
        hashes = "manifest" if content.get("promised") else "first sight"
        model = content.get("model") or content.get("uri") or folder.name
        found.append(Held(model, places.place(str(folder)), state, sum(there.values()), len(there), hashes))
    for family in catalog.families():
        for name in family.names:
            if family.hub_id(name) is None and (folder := built_folder(family, name)).is_dir():
                sizes = [path.stat().st_size for path in folder.iterdir() if is_model_file(path.name)]
                found.append(Held(name, places.place(str(folder)), COMPLETE, sum(sizes), len(sizes), "none"))
    if hub_cache().is_dir():
        root = places.place(str(hub_cache()))
        cached = in_mirror(root) if any(name.startswith(HUB) for name in list_names(root)) else []
        found += [Held(h.model, h.place, h.state, h.bytes, h.files, "hub") for h in cached if h.files]
    return found


def verify(place: Place, progress: Progress | None = None) -> tuple[int, list[str]]:
    """Reads every byte of a model of which the SHA-256 are known; (bytes read, what is wrong). Raises InputError where
    none are known, LlmftError where a copy to a mirror was never finished."""
    there = list_files(place)
    if UNFINISHED in there and MANIFEST not in there:
        raise LlmftError(
            f"{place.uri} is not complete, the copy to it was interrupted: run the same `llmft weights mirror` again"
        )
    promised = known_hashes(place)
    if not promised:
        listing = ", ".join(sorted(there)[:5]) or "nothing"
        raise InputError(
            f"{place.uri} has no {MANIFEST} ({listing} there), so nothing says what its bytes should be; give a folder "
            "that `llmft weights list` shows with a manifest, or make a mirror of it: `llmft weights mirror`"
        )
    read, wrong = check_files(place, promised, progress=progress)
    beyond = [name for name in there if is_model_file(name) and name not in promised]
    ours = MANIFEST in there and (manifest := read_manifest(place / MANIFEST)) is not None and manifest.ours
    return read, wrong + [f"{name}: is not in the manifest" for name in beyond if ours]


def cached_as(name: str, repository: str, catalog: Catalog, places: Places) -> list[Held]:
    """What this node holds of a model by its short name, hub id or URI. Raises InputError where it is nothing."""
    held = in_cache(catalog, places)
    wanted = {name, repository} - {""}
    found = [one for one in held if one.model in wanted]
    if not found:
        known = ", ".join(sorted({one.model for one in held})) or "nothing"
        raise InputError(
            f"{name}: neither a folder nor in this node's cache {cache_folder()}, which holds {known}; fetch it with "
            f"`llmft weights fetch {name}`, or give a folder or URI"
        )
    return found


def name_of(folder: Path) -> str:
    """What a model's folder is called: `owner/name` of a snapshot in the hub cache or of `owner--name`, else the
    folder's name."""
    parts = folder.absolute().parts
    own = parts[-3] if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith(HUB) else parts[-1]
    return own.removeprefix(HUB).replace("--", "/", 1)
