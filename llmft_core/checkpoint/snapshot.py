"""The model at one optimizer step, copied into host memory: all of a checkpoint that training has to wait for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmft_core.checkpoint.shards import MAX_SHARD, Shard, divide

if TYPE_CHECKING:
    import torch

    from llmft_core.extensions import Engine
    from llmft_core.plan import RunPlan


@dataclass
class Snapshot:
    """One rank's share. `tensors` is emptied as the files are written."""

    rank: int
    shards: list[Shard]
    """All files of the checkpoint, of all ranks."""
    tensors: dict[str, dict[str, torch.Tensor]]
    """This rank's files: name of the file → name of the tensor → its copy on the CPU, in `dtype`."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor of the checkpoint by name, of all ranks, persistent buffers included."""
    buffers: frozenset[str]
    """Those of them that are buffers: written in their own type, in the first file."""
    dtype: torch.dtype
    trained: frozenset[str]
    config: Any
    """The model's configuration objects of transformers, which are written as JSON."""
    generation_config: Any

    @property
    def writers(self) -> int:
        """Ranks 0 to this number, excluded, write files."""
        return 1 + max(shard.writer for shard in self.shards)


def take_snapshot(engine: Engine, plan: RunPlan, rank: int, world_size: int, max_shard: int = MAX_SHARD) -> Snapshot:
    """Gather the weights, each on the rank that will write it. Collective; nothing is written."""
    dtype = written_dtype(plan)
    model = engine.bare_model
    shapes = engine.shapes()
    shards = divide(shapes, dtype.itemsize, world_size, max_shard)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for shard in shards:
        gathered = engine.gathered(shard.names, dtype, rank=shard.writer)
        if rank == shard.writer:
            tensors[shard.file] = gathered
    buffers = persistent_buffers(model)
    if rank == 0:
        tensors[shards[0].file] |= {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
    return Snapshot(
        rank=rank,
        shards=shards,
        tensors=tensors,
        shapes={**shapes, **{name: tuple(buffer.shape) for name, buffer in buffers.items()}},
        buffers=frozenset(buffers),
        dtype=dtype,
        trained=frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        config=model.config,
        generation_config=getattr(model, "generation_config", None),
    )


def written_dtype(plan: RunPlan) -> torch.dtype:
    """The type of the written weights."""
    import torch

    name = plan.checkpoint.dtype if plan.checkpoint.dtype != "auto" else plan.precision
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[str(name)]


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state dictionary; no strategy partitions them."""
    kept = set(model.state_dict().keys())
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
