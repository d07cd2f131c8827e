"""Verify, describe, upload, mark. A checkpoint is complete and verified, or it does not exist."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmft_core.checkpoint.export import Exported
from llmft_core.errors import LlmftError
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import upload_many, write_bytes

MANIFEST = "manifest.json"
MARKER = ".is_checkpoint"
"""The completion marker, written last; what lacks it is not a checkpoint."""


def publish(folder: Path, target: Place, exported: Exported, facts: Mapping[str, Any]) -> int:
    """Verify the local folder, upload every file, verified, then the manifest, then the marker; then remove the
    folder. Returns the bytes uploaded.

    Raises LlmftError naming the local folder, which is kept, if anything fails.
    """
    try:
        verify_export(folder, exported)
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
        manifest = {
            "files": files,
            "tensors": {
                "count": len(exported.shapes),
                "trained": exported.trained,
                "changed": exported.changed,
                "unchanged": list(exported.unchanged),
                "not_in_base": list(exported.unknown),
            },
            **facts,
        }
        sent = upload_many([(folder / name, target / name) for name in files])
        for (name, described), sha256 in zip(files.items(), sent, strict=True):
            if sha256 != described["sha256"]:
                raise LlmftError(f"{(target / name).uri} is not what was uploaded")
        text = (json.dumps(manifest, indent=2) + "\n").encode()
        write_bytes(target / MANIFEST, text)
        marker = {"manifest_sha256": hashlib.sha256(text).hexdigest()}
        write_bytes(target / MARKER, (json.dumps(marker) + "\n").encode())
    except LlmftError as error:
        raise LlmftError(f"{target.uri} could not be published: {error}; the local copy is kept in {folder}") from error
    shutil.rmtree(folder)
    return sum(int(described["bytes"]) for described in files.values())


def verify_export(folder: Path, exported: Exported) -> None:
    """Re-open every weight file and hold names, shapes and types against the trained model and config.json.

    Raises LlmftError: the file on disk is not the model that was trained.
    """
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape())
                floating = str(part.get_dtype()) in {"F32", "BF16", "F16"}
                if floating and str(part.get_dtype()) != exported.dtype and name in exported.shapes:
                    raise LlmftError(f"{file.name}: {name} is {part.get_dtype()}, not {exported.dtype}")
    if found != dict(exported.shapes):
        wrong = sorted({*found.items()} ^ {*exported.shapes.items()})[:3]
        raise LlmftError(f"the written tensors are not the model's: {wrong}")
    config = json.loads((folder / "config.json").read_text())
    text_config = config.get("text_config", config)
    embeddings = [shape for name, shape in found.items() if name.endswith("embed_tokens.weight")]
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


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
