"""The trained model as a Hugging Face folder, gathered tensor by tensor: memory beyond training is one shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.errors import LlmftError

if TYPE_CHECKING:
    import torch

    from llmft_core.extensions import Engine
    from llmft_core.plan import RunPlan

MAX_SHARD = 5_000_000_000
"""Bytes of one safetensors file, as transformers splits."""


@dataclass(frozen=True)
class Exported:
    """What rank 0 wrote: tensor name → shape, the type's name in safetensors, and how the tensors stand to the base."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    trained: int
    changed: int
    unchanged: tuple[str, ...]
    unknown: tuple[str, ...]


def written_dtype(plan: RunPlan) -> torch.dtype:
    """The type of the written weights."""
    import torch

    name = plan.checkpoint.dtype if plan.checkpoint.dtype != "auto" else plan.precision
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[str(name)]


def export(
    engine: Engine,
    plan: RunPlan,
    base: Path,
    tokenizer: Path,
    stop_ids: tuple[int, ...],
    folder: Path | None,
    max_shard: int = MAX_SHARD,
) -> Exported | None:
    """Write weights, configuration and tokenizer into `folder` on rank 0; the others pass None and take part in the
    gathering. `base` is the model folder that training started from.

    Raises LlmftError where a tensor is not finite, or where no trained tensor differs from the base.
    """
    from safetensors.torch import save_file

    dtype = written_dtype(plan)
    model = engine.bare_model
    shapes = engine.shapes()
    buffers = persistent_buffers(model)
    shards = split_into_shards(shapes, dtype.itemsize, max_shard)
    names = shard_names(len(shards))
    comparison = Comparison(base) if folder is not None else None
    weight_map: dict[str, str] = {}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for index, (file, wanted) in enumerate(zip(names, shards, strict=True)):
        tensors: dict[str, torch.Tensor] = {}
        for name in wanted:
            tensors |= engine.gathered([name], dtype)
            if comparison is not None and name in tensors:
                comparison.look_at(name, tensors[name], name in trained)
        if folder is not None:
            if index == 0:
                tensors |= {name: buffer.detach().cpu().contiguous() for name, buffer in buffers.items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    if folder is None or comparison is None:
        return None
    comparison.judge()
    if len(names) > 1:
        total = sum(_numel(shape) * dtype.itemsize for shape in shapes.values())
        index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")
    write_configuration(model, folder, dtype, stop_ids)
    for source in sorted(tokenizer.iterdir()):
        shutil.copyfile(source, folder / source.name)
    all_shapes = {**shapes, **{name: tuple(buffer.shape) for name, buffer in buffers.items()}}
    name = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}[str(dtype)]
    unchanged, unknown = tuple(comparison.unchanged), tuple(comparison.unknown)
    return Exported(all_shapes, name, len(trained), comparison.changed, unchanged, unknown)


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
        self.unknown: list[str] = []  # trained tensors that the base has under another name, or not at all

    def look_at(self, name: str, tensor: torch.Tensor, trained: bool) -> None:
        """Count whether a trained tensor moved. Raises LlmftError if it holds NaN or infinity."""
        import torch

        if not bool(torch.isfinite(tensor).all()):
            raise LlmftError(f"{name} holds NaN or infinity after training: nothing is published; lower --lr and rerun")
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

    def judge(self) -> None:
        """Raises LlmftError if nothing that was trained differs from the base: that would be the base model. Of tensors
        that the base does not have nothing can be said; the manifest lists them."""
        if self.unchanged and not self.changed:
            raise LlmftError(
                f"none of {len(self.unchanged)} trained tensors differs from the base model: nothing is published; "
                "is --lr too small for --checkpoint.dtype?"
            )


def write_configuration(model: torch.nn.Module, folder: Path, dtype: torch.dtype, stop_ids: tuple[int, ...]) -> None:
    """config.json and generation_config.json; the latter ends an answer at the closing token that was trained."""
    from transformers import GenerationConfig

    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")  # the latter for transformers 4
    config["use_cache"] = True
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = getattr(model, "generation_config", None) or GenerationConfig()
    old = generation.eos_token_id
    known = [] if old is None else [old] if isinstance(old, int) else list(old)
    written = GenerationConfig.from_dict(generation.to_dict())
    written.eos_token_id = list(dict.fromkeys([*known, *stop_ids])) or None
    written.save_pretrained(folder)


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state dictionary; no strategy partitions them."""
    kept = set(model.state_dict().keys())
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def split_into_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    """Names in the model's order, at most `limit` bytes a shard unless one tensor alone is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        more = _numel(shape) * itemsize
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def shard_names(count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors`."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for dimension in shape:
        product *= dimension
    return product
