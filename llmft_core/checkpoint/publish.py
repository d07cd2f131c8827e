"""Verify, upload, mark: a Hugging Face checkpoint is complete and verified, or it does not exist."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmft_core.checkpoint.adapter import is_adapter, verify_adapter
from llmft_core.checkpoint.export import Exported, exported_from_json, exported_to_json, judge
from llmft_core.checkpoint.together import Said, assemble, promised, send_part
from llmft_core.errors import LlmftError
from llmft_core.storage.places import Place

MARKER = ".is_checkpoint"
"""The completion marker, written last; what lacks it is not a checkpoint."""


def publish_part(folder: Path, target: Place, exported: Exported, rank: int) -> None:
    """What a rank other than 0 does, as `together.send_part`."""
    said = {"exported": exported_to_json(exported)}
    with promised(target, rank):
        send_part(folder, target, rank, lambda: verify_weights(folder, exported), said)


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
    """What rank 0 does, as `together.assemble`. `shapes` are those of the whole model. Returns the bytes uploaded by
    all."""

    def check() -> None:
        verify_folder(folder, shapes)
        verify_weights(folder, exported)

    def manifest(parts: Sequence[Said]) -> dict[str, Any]:
        return {**merged([exported_from_json(part["exported"]) for part in parts], shapes, trained), **facts}

    way_out = f": `llmft checkpoint push {folder} {target.uri}` uploads it" if writers == 1 else ""
    said = {"exported": exported_to_json(exported)}
    return assemble(folder, target, writers, check, said, manifest, MARKER, way_out)


def merged(parts: list[Exported], shapes: Mapping[str, tuple[int, ...]], trained: int) -> dict[str, Any]:
    """What the manifest says of tensors. Raises LlmftError where the parts together are not the model, or not a
    trained one."""
    found = {name: shape for part in parts for name, shape in part.shapes.items()}
    if found != dict(shapes):
        wrong = sorted({*found.items()} ^ {*shapes.items()})[:3]
        raise LlmftError(f"the written tensors are not the model's: {wrong}")
    judge(parts)
    return {
        "tensors": {
            "count": len(shapes),
            "trained": trained,
            "changed": sum(part.changed for part in parts),
            "unchanged": [name for part in parts for name in part.unchanged],
            "not_in_base": [name for part in parts for name in part.unknown],
        },
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
    """Hold configuration and tokenizer against the whole model, or the adapter. Raises LlmftError."""
    if is_adapter(folder):
        verify_adapter(folder, shapes)
        check_tokenizer(folder, shapes)
        return
    config = json.loads((folder / "config.json").read_text())
    text_config = config.get("text_config", config)
    embeddings = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
    if embeddings and embeddings[0][0] != text_config.get("vocab_size"):
        raise LlmftError(f"config.json says vocab_size {text_config.get('vocab_size')}, embeddings {embeddings[0][0]}")
    check_tokenizer(folder, shapes)


def check_tokenizer(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The files that are in every checkpoint are there, and embeddings that are in it have a row for each token.
    Raises LlmftError."""
    for needed in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if not (folder / needed).is_file():
            raise LlmftError(f"{needed} is missing in the exported folder")
    embeddings = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
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
