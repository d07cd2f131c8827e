"""Checkpoints that hold an adapter instead of a model, in PEFT's layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.errors import LlmftError
from llmft_core.values import Adapter

if TYPE_CHECKING:
    import torch

    from llmft_core.extensions import Engine

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterStart:
    """An adapter before the first step: what a trained one has to differ from."""

    adapter: Adapter
    digests: Mapping[str, str]
    """Tensor of the file → SHA-256 of its values, on rank 0; {} on the others."""


def start_of(engine: Engine, adapter: Adapter) -> AdapterStart:
    """After `Engine.prepare`, before a state is restored. Collective."""
    tensors = gather_adapter(engine, adapter, rank=0)
    return AdapterStart(adapter, {name: digest_of(tensor) for name, tensor in tensors.items()})


def gather_adapter(engine: Engine, adapter: Adapter, rank: int) -> dict[str, torch.Tensor]:
    """The adapter's tensors in fp32 by their names in the file, on this one rank. Collective."""
    import torch

    gathered = engine.gathered(list(adapter.tensors), torch.float32, rank=rank)
    return {adapter.tensors[parameter]: tensor for parameter, tensor in gathered.items()}


def digest_of(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) of a tensor's fp32 values."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def is_adapter(folder: Path) -> bool:
    """Whether a local folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def write_adapter_config(adapter: Adapter, folder: Path) -> None:
    """adapter_config.json."""
    text = json.dumps(adapter.config, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises LlmftError where it is none."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        config["peft_type"], config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise LlmftError(f"{folder / ADAPTER_CONFIG} is no configuration of an adapter ({error!r})") from error
    return dict(config)


def verify_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Its configuration names a base, and no tensor is empty: under ZeRO-3 a careless export writes shapes of 0. Raises
    LlmftError."""
    if not read_adapter_config(folder)["base_model_name_or_path"]:
        raise LlmftError(f"{ADAPTER_CONFIG} names no base model")
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty or not shapes:
        raise LlmftError(f"{ADAPTER_FILE} holds no values of {', '.join(empty[:3]) or 'anything'}")
