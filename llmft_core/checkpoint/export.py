"""Gathered tensors as files of a Hugging Face folder. Nothing here touches the model or other ranks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.checkpoint.adapter import AdapterStart, digest_of, write_adapter_config
from llmft_core.checkpoint.snapshot import Layout
from llmft_core.errors import UselessWeights

if TYPE_CHECKING:
    import torch

SAFETENSORS_TYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


@dataclass(frozen=True)
class Exported:
    """What one rank wrote: tensor name → shape, the type's name in safetensors, and how the trained tensors stand to
    the base model's."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    buffers: frozenset[str]
    """Tensors that keep a type of their own."""
    changed: int
    unchanged: tuple[str, ...]
    unknown: tuple[str, ...]
    """Trained tensors that the base has under another name, or not at all."""


class WeightWriter:
    """Writes one rank's weight files into `folder`. `base` is the model folder that training started from."""

    def __init__(self, layout: Layout, base: Path, folder: Path) -> None:
        self._layout, self._folder = layout, folder
        self._comparison = Comparison(base) if layout.adapter is None else SinceStart(layout.adapter)
        self._shapes: dict[str, tuple[int, ...]] = {}

    def write(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """One file. Raises UselessWeights where a tensor is not finite."""
        from safetensors.torch import save_file

        for name, tensor in tensors.items():
            if name not in self._layout.buffers:
                self._comparison.look_at(name, tensor, name in self._layout.trained)
            self._shapes[name] = tuple(tensor.shape)
        save_file(dict(tensors), self._folder / file, metadata={"format": "pt"})

    def exported(self) -> Exported:
        """What was written."""
        found = self._comparison
        return Exported(
            self._shapes,
            SAFETENSORS_TYPES[str(self._layout.dtype)],
            self._layout.buffers,
            found.changed,
            tuple(found.unchanged),
            tuple(found.unknown),
        )


def write_rest(layout: Layout, tokenizer: Path, stop_ids: tuple[int, ...], folder: Path) -> None:
    """Everything beside the weights: rank 0's part."""
    if len(layout.shards) > 1:
        total = sum(math.prod(shape) * layout.dtype.itemsize for shape in layout.shapes.values())
        weight_map = {name: shard.file for shard in layout.shards for name in shard.names}
        weight_map |= dict.fromkeys(layout.buffers, layout.shards[0].file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if layout.adapter is None:
        write_configuration(layout, folder)
    else:
        write_adapter_config(layout.adapter.adapter, folder)
    write_generation_config(layout, folder, stop_ids)
    for source in sorted(tokenizer.iterdir()):
        shutil.copyfile(source, folder / source.name)


class Comparison:
    """Holds exported tensors against the base model's files, one at a time, never the whole model."""

    def __init__(self, base: Path) -> None:
        from safetensors import safe_open

        self.base: dict[str, Any] = {}
        for file in sorted(base.glob("*.safetensors")):
            opened: Any = safe_open(file, framework="pt")
            self.base |= dict.fromkeys(opened.keys(), opened)
        self.changed = 0
        self.unchanged: list[str] = []
        self.unknown: list[str] = []

    def look_at(self, name: str, tensor: torch.Tensor, trained: bool) -> None:
        """Count whether a trained tensor moved. Raises UselessWeights if it holds NaN or infinity."""
        import torch

        check_finite(name, tensor)
        if not trained:
            return
        # Some base files leave out the module's own prefix (GPT-2: `h.0…` for `transformer.h.0…`).
        known = next((one for one in (name, name.partition(".")[2]) if one in self.base), None)
        if known is None:
            self.unknown.append(name)
            return
        before = self.base[known].get_tensor(known).to(tensor.dtype)
        rows = tensor[: len(before)] if tensor.ndim and before.ndim else tensor  # embeddings have grown by new tokens
        if before.shape != rows.shape or not torch.equal(before, rows):
            self.changed += 1
        else:
            self.unchanged.append(name)


class SinceStart:
    """Holds an adapter's tensors, all of them trained, against what they were before the first step."""

    def __init__(self, start: AdapterStart) -> None:
        self.start = start
        self.changed = 0
        self.unchanged: list[str] = []
        self.unknown: tuple[str, ...] = ()

    def look_at(self, name: str, tensor: torch.Tensor, trained: bool) -> None:
        """As `Comparison.look_at`."""
        check_finite(name, tensor)
        if digest_of(tensor) != self.start.digests[name]:
            self.changed += 1
        else:
            self.unchanged.append(name)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises UselessWeights if a tensor holds NaN or infinity."""
    if not bool(tensor.isfinite().all()):
        raise UselessWeights(f"{name} holds NaN or infinity after training: nothing is published; lower --lr and rerun")


def write_configuration(layout: Layout, folder: Path) -> None:
    """config.json."""
    layout.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = config["torch_dtype"] = str(layout.dtype).removeprefix("torch.")  # the latter: transformers 4
    config["use_cache"] = True
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_generation_config(layout: Layout, folder: Path, stop_ids: tuple[int, ...]) -> None:
    """generation_config.json, which ends an answer at the closing token that was trained."""
    from transformers import GenerationConfig

    generation = layout.generation_config or GenerationConfig()
    old = generation.eos_token_id
    known = [] if old is None else [old] if isinstance(old, int) else list(old)
    written = GenerationConfig.from_dict(generation.to_dict())
    written.eos_token_id = list(dict.fromkeys([*known, *stop_ids])) or None
    written.save_pretrained(folder)


def judge(parts: list[Exported]) -> None:
    """Raises UselessWeights if nothing that was trained differs from the base: that would be the base model. Of tensors
    that the base does not have nothing can be said; the manifest lists them."""
    unchanged = sum(len(part.unchanged) for part in parts)
    if unchanged and not any(part.changed for part in parts):
        raise UselessWeights(
            f"none of {unchanged} trained tensors differs from the base model: nothing is published; "
            "is --lr too small for --checkpoint.dtype?"
        )


def exported_to_json(exported: Exported) -> dict[str, Any]:
    """As JSON data, for the rank that puts the parts together."""
    return {**asdict(exported), "buffers": sorted(exported.buffers)}


def exported_from_json(data: Mapping[str, Any]) -> Exported:
    """The inverse of `exported_to_json`."""
    return Exported(
        **{
            **data,
            "shapes": {name: tuple(shape) for name, shape in data["shapes"].items()},
            "buffers": frozenset(data["buffers"]),
            "unchanged": tuple(data["unchanged"]),
            "unknown": tuple(data["unknown"]),
        }
    )
