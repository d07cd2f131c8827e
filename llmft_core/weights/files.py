"""Which files make a model: those that are fetched, what must be there, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmft_core.errors import InputError

Wanted = Callable[[str], bool]
"""Whether a file (its path relative to the model's folder) is needed."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
SMALL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
INDEX = "model.safetensors.index.json"
NOT_THE_MODEL = ("consolidated", "adapter_")  # the vendor's own layout of the same weights; LoRA adapters
SAMPLES, SAMPLE_BYTES = 64, 65536


def is_tokenizer_file(relative: str) -> bool:
    """Files of the tokenizer alone."""
    return relative in TOKENIZER_FILES


def is_small_file(relative: str) -> bool:
    """Config and tokenizer: what the driver needs before any weights move."""
    return relative in SMALL_FILES


def is_weight_file(relative: str) -> bool:
    """Weights in safetensors at the top level: no pickles, no `original/`, no `consolidated.*`."""
    if "/" in relative or relative.startswith(NOT_THE_MODEL):
        return False
    return relative.endswith(".safetensors") or relative == INDEX


def is_model_file(relative: str) -> bool:
    """Everything that a model needs here."""
    return is_small_file(relative) or is_weight_file(relative)


def read_config(folder: Path, origin: str) -> dict[str, Any]:
    """config.json. InputError naming what is missing or broken; `origin` is what the user wrote."""
    path = folder / "config.json"
    if not path.is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else []
        if "adapter_config.json" in found:
            raise InputError(
                f"model {origin}: it is an adapter, not a model: `llmft checkpoint merge {origin} --out FOLDER` makes "
                "one of it and its base"
            )
        raise InputError(
            f"model {origin}: no config.json in it ({', '.join(found) or 'nothing'} there); "
            "give the folder that holds config.json, *.safetensors and tokenizer files"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"model {origin}: config.json is not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise InputError(f"model {origin}: config.json holds no object; fetch it again")
    return config


def check_weights(names: Iterable[str], origin: str) -> None:
    """InputError where none of these files holds weights in safetensors."""
    names = list(names)
    if any(is_weight_file(name) and name != INDEX for name in names):
        return
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    there = f"only {', '.join(sorted(pickles)[:3])}, pickles that can run code and are not read" if pickles else "none"
    raise InputError(
        f"model {origin}: no weights in safetensors ({there}); convert them with transformers' "
        "from_pretrained(...).save_pretrained(FOLDER) where you trust them, and use --model FOLDER"
    )


def check_complete(folder: Path, origin: str) -> None:
    """InputError where weights are missing that the index lists, or all of them."""
    check_weights((entry.name for entry in folder.iterdir()), origin)
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"model {origin}: {INDEX} has no weight_map ({error!r}); fetch it again") from error
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        listing = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(f"model {origin}: {len(missing)} of {len(listed)} weight files are missing ({listing})")


def identity(folder: Path) -> str:
    """SHA-256 (hex) that tells models apart: small files by all of their bytes, weights by their size and 64 blocks
    of 64 KiB, evenly spread, because reading 140 GB takes minutes. For provenance, not against tampering."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not is_model_file(path.name) or not path.is_file():
            continue
        size = path.stat().st_size  # bytes
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
