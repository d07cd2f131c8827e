"""States that lie in storage: which are complete, and one of them on its way into an engine."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft_core.checkpoint.state import MARKER, NAME, PROGRESS, Fragments, Progress
from llmft_core.checkpoint.stored import vouched_manifest
from llmft_core.errors import InputError, LlmftError
from llmft_core.extensions import Engine
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import delete, delete_folder, download, exists, list_files, read_bytes


@dataclass(frozen=True)
class StoredState:
    """A complete state: its manifest is the one that the marker vouches for."""

    place: Place
    manifest: dict[str, Any]
    progress: Progress


def list_states(run: Place) -> dict[int, bool]:
    """The states of a run by number, and whether each is complete."""
    found: dict[int, bool] = {}
    for path in list_files(run):
        folder, _, file = path.partition("/")
        if file and (match := NAME.fullmatch(folder)):
            number = int(match[1])
            found[number] = found.get(number, False) or file == MARKER
    return found


def newest_state(run: Place, first: int = 0) -> Place | None:
    """The complete state with the highest number, `first` at least; incomplete ones are not looked at."""
    complete = [number for number, whole in list_states(run).items() if whole and number >= first]
    return run / f"state_{max(complete):05d}" if complete else None


def open_state(place: Place) -> StoredState:
    """Reads manifest and progress. Raises InputError where it is no complete state, LlmftError where it is damaged."""
    if not exists(place / MARKER):
        raise InputError(
            f"{place.uri} is not a complete state (it has no {MARKER}): give a run, or another state_NNNNN"
        )
    manifest = vouched_manifest(place, MARKER)
    text = read_bytes(place / PROGRESS)
    if hashlib.sha256(text).hexdigest() != manifest["files"].get(PROGRESS, {}).get("sha256"):
        raise LlmftError(f"{place.uri}: {PROGRESS} is not the one that the manifest describes: use an older state")
    try:
        return StoredState(place, manifest, Progress.from_json(json.loads(text)))
    except (TypeError, ValueError) as error:
        raise LlmftError(
            f"{place.uri}: {PROGRESS} is not what this llmft writes ({error}): resume with its own version"
        ) from error


def remove_state(place: Place) -> None:
    """Delete a state. The marker goes first: whoever looks meanwhile sees an incomplete one."""
    if exists(place / MARKER):
        delete(place / MARKER)
    delete_folder(place)


def restore(state: StoredState, engine: Engine, cache: Path) -> None:
    """Give the engine its part. Files are fetched into this node's cache, each once for all ranks of the node, and
    verified. All ranks call it. Raises LlmftError: a state that does not load never becomes a fresh start."""
    fragments = Fragments(state.manifest["fragments"], lambda file: _fetched(state, file, cache))
    try:
        engine.restore(fragments.read, state.progress.counters)
    finally:
        fragments.close()


def forget(state: StoredState, cache: Path) -> None:
    """Remove this node's copies, once none of its ranks reads them any more."""
    shutil.rmtree(_folder(state, cache), ignore_errors=True)  # another rank may be removing them too


def _folder(state: StoredState, cache: Path) -> Path:
    return cache / "states" / hashlib.sha256(json.dumps(state.manifest["files"]).encode()).hexdigest()[:32]


def _fetched(state: StoredState, file: str, cache: Path) -> Path:
    from filelock import FileLock

    folder = _folder(state, cache)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    with FileLock(folder / f"{file}.lock"):
        if not path.exists():
            download(state.place / file, path, state.manifest["files"][file]["sha256"])
    return path
