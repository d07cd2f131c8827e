"""A local folder becomes a checkpoint in storage: one that was pulled, or the copy that a failed upload left."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmft_core.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_FILE, is_adapter
from llmft_core.checkpoint.publish import MARKER, verify_folder
from llmft_core.checkpoint.staging import PARTIAL
from llmft_core.checkpoint.stored import read_manifest, verify_stored
from llmft_core.checkpoint.together import MANIFEST, PART, describe
from llmft_core.errors import InputError, LlmftError
from llmft_core.storage.check import check_files
from llmft_core.storage.engine import Progress
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import delete, list_files, read_bytes, upload_many, write_bytes

INDEX = "model.safetensors.index.json"
NOTE = re.compile(re.escape(PART.format(rank="")) + r"\d+")


@dataclass(frozen=True)
class Local:
    """A local folder that was found to be a whole checkpoint."""

    files: Mapping[str, Mapping[str, Any]]
    """File name → its `bytes` and `sha256`, without manifest and marker."""
    manifest: bytes
    marker: bytes


@dataclass(frozen=True)
class Pushed:
    """What `push` did. Bytes: all files of the checkpoint, and those that lay there already."""

    bytes: int
    continued: int


def push(folder: Path, source: Place, target: Place, progress: Progress | None = None) -> Pushed:
    """Upload a folder as a complete checkpoint: files, manifest, and the marker last. `source` is the folder as a
    place. The local files are kept.

    What an interrupted push, or the run itself, has left at the target is compared byte for byte, and only the rest is
    sent. Raises InputError where the folder is no whole checkpoint or the target holds anything else, LlmftError for a
    wrong byte; nothing has been uploaded then.
    """
    local = look_at(folder, source)
    there = free_or_begun(target, local)
    promised = {name: (int(told["bytes"]), str(told["sha256"])) for name, told in local.files.items()}
    same = {name: promised[name] for name in there}
    _, wrong = check_files(target, same)
    if wrong:
        raise InputError(f"{target.uri} holds files of another checkpoint ({'; '.join(wrong)}): choose another target")
    missing = [name for name in promised if name not in there]
    sent = upload_many([(folder / name, target / name) for name in missing], progress=progress)
    changed = [name for name, sha256 in zip(missing, sent, strict=True) if sha256 != promised[name][1]]
    if changed:
        raise LlmftError(
            f"{folder} was changed while it was uploaded ({', '.join(changed)}): {target.uri} stays incomplete; remove "
            "what is there, and push again once nobody writes to the folder"
        )
    write_bytes(target / MANIFEST, local.manifest)
    for name in list_files(target):
        if NOTE.fullmatch(name):
            delete(target / name)
    write_bytes(target / MARKER, local.marker)
    return Pushed(sum(size for size, _ in promised.values()), sum(size for size, _ in same.values()))


def look_at(folder: Path, source: Place) -> Local:
    """Read every byte of a folder: it is what its manifest says or, without one, a whole Hugging Face folder. Raises
    InputError where it is neither, LlmftError where it is damaged."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one that `llmft checkpoint pull` made, or a kept local copy")
    if folder.suffix == PARTIAL:
        raise InputError(f"{folder} was still being written when its process ended: it cannot be pushed")
    if (folder / MARKER).is_file():
        _, wrong = verify_stored(source)
        if wrong:
            raise LlmftError(f"{folder} is damaged: {'; '.join(wrong)}: nothing was uploaded; pull it again")
        files = read_manifest(source)["files"]
        return Local(files, (folder / MANIFEST).read_bytes(), (folder / MARKER).read_bytes())
    if (folder / MANIFEST).exists():
        raise InputError(
            f"{folder} has a {MANIFEST} but no {MARKER}, so it is not whole: pull it again; to push the files as they "
            f"are, unverified against it, remove {MANIFEST}"
        )
    odd = sorted(path.name for path in folder.iterdir() if not path.is_file())
    if odd:
        raise InputError(f"{folder} holds more than files ({', '.join(odd[:3])}): a checkpoint is one flat folder")
    shapes = whole_model(folder)
    try:
        verify_folder(folder, shapes)
    except (LlmftError, OSError, ValueError) as error:
        raise LlmftError(f"{folder} is not a checkpoint that can be served ({error}): nothing was uploaded") from error
    files = {path.name: describe(path) for path in sorted(folder.iterdir())}
    # Of training nothing can be known here: no step, and no metrics.
    facts = {
        "tensors": {"count": len(shapes)},
        "metrics": {},
        "pushed": True,
        "provenance": {"llmft": version("llmft")},
    }
    manifest = (json.dumps({"files": files, **facts}, indent=2) + "\n").encode()
    marker = {"manifest_sha256": hashlib.sha256(manifest).hexdigest()}
    return Local(files, manifest, (json.dumps(marker) + "\n").encode())


def whole_model(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a folder's safetensors. Raises InputError where it is a part of a model only (several
    ranks write one checkpoint, each its own files), LlmftError where a file is damaged."""
    from safetensors import SafetensorError, safe_open

    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    found: dict[str, tuple[int, ...]] = {}
    held: dict[str, str] = {}
    for name in weights:
        try:
            with safe_open(folder / name, framework="pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118 - not a dictionary
                    found[tensor] = tuple(opened.get_slice(tensor).get_shape())
                    held[tensor] = name
        except (SafetensorError, OSError) as error:
            raise LlmftError(f"{folder / name} is damaged ({error}): nothing was uploaded") from None
    own = (ADAPTER_CONFIG, ADAPTER_FILE) if is_adapter(folder) else ("config.json",)
    lacking = [name for name in (*own, "tokenizer.json") if not (folder / name).is_file()]
    if not weights:
        lacking.append("*.safetensors")
    if is_adapter(folder):
        if weights not in ([], [ADAPTER_FILE]):
            raise InputError(f"{folder} holds an adapter and other weights ({', '.join(weights)}): keep one of the two")
    elif (folder / INDEX).is_file():
        try:
            wanted = json.loads((folder / INDEX).read_text())["weight_map"]
            lacking += sorted({*wanted.values()} - {*weights})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LlmftError(f"{folder / INDEX} is damaged ({error!r}): nothing was uploaded") from None
        if not lacking and wanted != held:
            odd = sorted({*wanted.items()} ^ {*held.items()})[0][0]
            raise LlmftError(f"{folder}: {INDEX} and the files disagree about {odd}: nothing was uploaded")
    elif weights and weights != ["model.safetensors"]:
        lacking.append(INDEX)
    if lacking:
        part = any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in weights)
        why = (
            "it is one rank's part of a checkpoint that several ranks wrote; bring the parts of all of them (on each "
            "node below LLMFT_CACHE/staging) into one folder and push that"
            if part
            else "give a whole checkpoint: one that `llmft checkpoint pull` made, or a local copy that a run kept"
        )
        raise InputError(f"{folder} lacks {', '.join(lacking[:3])}: {why}")
    return found


def free_or_begun(target: Place, local: Local) -> set[str]:
    """Our files that lie at the target already, by name and size. Raises InputError where anything else does."""
    there = list_files(target)
    if MARKER in there:
        same = read_bytes(target / MARKER) == local.marker
        what = "this very checkpoint, complete: there is nothing to do" if same else "a complete checkpoint"
        raise InputError(f"{target.uri} holds {what}" + ("" if same else ": choose another target, or remove it"))
    if there.get(MANIFEST) is not None and read_bytes(target / MANIFEST) != local.manifest:
        raise InputError(f"{target.uri} holds an unfinished checkpoint of other content: choose another target")
    ours = {name for name in there if name in local.files and there[name] == local.files[name]["bytes"]}
    others = [name for name in there if name not in ours and name != MANIFEST and not NOTE.fullmatch(name)]
    if others:
        raise InputError(
            f"{target.uri} holds other files ({', '.join(others[:3])}{' …' if len(others) > 3 else ''}), which are not "
            "those of this checkpoint: choose another target, or remove them"
        )
    return ours
