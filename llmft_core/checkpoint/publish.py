"""Verify, describe, upload, mark. A checkpoint is complete and verified, or it does not exist.

Each rank uploads its own files and describes them in a `manifest.part-K`; rank 0 waits for all parts, merges them into
the manifest and writes the marker. They meet in the storage, so that no collective runs beside training.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft_core.checkpoint.export import Exported, exported_from_json, exported_to_json, judge
from llmft_core.errors import LlmftError, one_line
from llmft_core.storage.engine import GRACE, SLOWEST
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import delete, exists, read_bytes, upload_many, write_bytes

MANIFEST = "manifest.json"
MARKER = ".is_checkpoint"
"""The completion marker, written last; what lacks it is not a checkpoint."""
PART = "manifest.part-{rank}"
LOOK_EVERY = 0.5  # seconds between two looks for the other ranks' parts

Files = Mapping[str, Mapping[str, Any]]
"""File name → its `bytes` and `sha256`."""


@dataclass(frozen=True)
class Part:
    """What one rank has uploaded."""

    files: Files
    exported: Exported


def upload_part(folder: Path, target: Place, exported: Exported) -> Part:
    """Verify this rank's local files and upload them, verified. The folder is kept. Raises LlmftError."""
    verify_weights(folder, exported)
    files = {path.name: describe(path) for path in sorted(folder.iterdir())}
    sent = upload_many([(folder / name, target / name) for name in files])
    for (name, described), sha256 in zip(files.items(), sent, strict=True):
        if sha256 != described["sha256"]:
            raise LlmftError(f"{(target / name).uri} is not what was uploaded")
    return Part(files, exported)


def publish_part(folder: Path, target: Place, exported: Exported, rank: int) -> None:
    """What a rank other than 0 does: upload, tell rank 0 through the storage, remove the local files.

    Raises LlmftError naming the local folder, which is kept, if anything fails; rank 0 is told then too, if the storage
    takes it.
    """
    note = target / PART.format(rank=rank)
    try:
        part = upload_part(folder, target, exported)
        said = {"files": part.files, "exported": exported_to_json(part.exported)}
        write_bytes(note, json.dumps(said).encode())
    except Exception as error:  # whatever it is, rank 0 waits for a word
        failure = LlmftError(f"rank {rank}'s part of {target.uri} could not be published: {one_line(error)}")
        failure.add_note(f"the local copy is kept in {folder}")
        with suppress(LlmftError):  # the first error says already what is wrong with the storage
            write_bytes(note, json.dumps({"error": one_line(failure)}).encode())
        raise failure from error
    shutil.rmtree(folder)


def publish(
    folder: Path,
    target: Place,
    exported: Exported,
    facts: Mapping[str, Any],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    trained: int,
    writers: int = 1,
) -> int:
    """What rank 0 does: upload its part, wait for those of ranks 1 to `writers` - 1, then write the manifest and the
    marker, and remove the local folder. `shapes` are those of the whole model. Returns the bytes uploaded by all.

    Raises LlmftError naming the local folder, which is kept, if anything fails.
    """
    try:
        verify_folder(folder, shapes)
        parts = [upload_part(folder, target, exported)]
        total = 4 * writers * sum(int(described["bytes"]) for described in parts[0].files.values())
        until = time.monotonic() + 2 * GRACE + total / SLOWEST
        parts += [await_part(target, rank, until) for rank in range(1, writers)]
        manifest = merged(parts, shapes, trained, facts)
        text = (json.dumps(manifest, indent=2) + "\n").encode()
        write_bytes(target / MANIFEST, text)
        for rank in range(1, writers):
            delete(target / PART.format(rank=rank))
        marker = {"manifest_sha256": hashlib.sha256(text).hexdigest()}
        write_bytes(target / MARKER, (json.dumps(marker) + "\n").encode())
    except Exception as error:  # whatever it is, the local copy is worth naming
        way = f": `llmft checkpoint push {folder} {target.uri}` uploads it" if writers == 1 else ""
        raise LlmftError(
            f"{target.uri} could not be published: {error}; the local copy is kept in {folder}{way}"
        ) from error
    shutil.rmtree(folder)
    return sum(int(described["bytes"]) for described in manifest["files"].values())


def await_part(target: Place, rank: int, until: float) -> Part:
    """What another rank has uploaded, once it says so. `until` by `time.monotonic`. Raises LlmftError where that rank
    failed, or says nothing in time."""
    note = target / PART.format(rank=rank)
    while not exists(note):
        if time.monotonic() > until:
            raise LlmftError(f"rank {rank} has not uploaded its part in time")
        time.sleep(LOOK_EVERY)
    said = json.loads(read_bytes(note))
    if "error" in said:
        raise LlmftError(said["error"])
    return Part(said["files"], exported_from_json(said["exported"]))


def merged(
    parts: list[Part], shapes: Mapping[str, tuple[int, ...]], trained: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest. Raises LlmftError where the parts together are not the model, or not a trained one."""
    found = {name: shape for part in parts for name, shape in part.exported.shapes.items()}
    if found != dict(shapes):
        wrong = sorted({*found.items()} ^ {*shapes.items()})[:3]
        raise LlmftError(f"the written tensors are not the model's: {wrong}")
    judge([part.exported for part in parts])
    return {
        "files": {name: dict(described) for part in parts for name, described in sorted(part.files.items())},
        "tensors": {
            "count": len(shapes),
            "trained": trained,
            "changed": sum(part.exported.changed for part in parts),
            "unchanged": [name for part in parts for name in part.exported.unchanged],
            "not_in_base": [name for part in parts for name in part.exported.unknown],
        },
        **facts,
    }


def verify_weights(folder: Path, exported: Exported) -> None:
    """Re-open every weight file of this rank and hold names, shapes and types against what was to be written.

    Raises LlmftError: the file on disk is not the model that was trained.
    """
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape())
                if str(part.get_dtype()) != exported.dtype and name not in exported.buffers:
                    raise LlmftError(f"{file.name}: {name} is {part.get_dtype()}, not {exported.dtype}")
    if found != dict(exported.shapes):
        wrong = sorted({*found.items()} ^ {*exported.shapes.items()})[:3]
        raise LlmftError(f"the written tensors are not the model's: {wrong}")


def verify_folder(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold configuration and tokenizer against the whole model. Raises LlmftError."""
    config = json.loads((folder / "config.json").read_text())
    text_config = config.get("text_config", config)
    embeddings = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
    if embeddings and embeddings[0][0] != text_config.get("vocab_size"):
        raise LlmftError(f"config.json says vocab_size {text_config.get('vocab_size')}, embeddings {embeddings[0][0]}")
    for needed in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if not (folder / needed).is_file():
            raise LlmftError(f"{needed} is missing in the exported folder")
    entries = _tokenizer_entries(folder)
    if embeddings and entries > embeddings[0][0]:
        raise LlmftError(f"the tokenizer has {entries} entries, the embeddings {embeddings[0][0]}")


def _tokenizer_entries(folder: Path) -> int:
    """Entries of the exported tokenizer, loaded as a server will load it. Raises LlmftError."""
    from transformers import AutoTokenizer

    try:
        return len(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        raise LlmftError(f"the exported tokenizer cannot be loaded ({error})") from error


def describe(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 (hex) of a local file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
