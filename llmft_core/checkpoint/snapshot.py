"""The model at one optimizer step, copied into host memory: all of a checkpoint that training has to wait for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmft_core.checkpoint.adapter import ADAPTER_FILE, AdapterStart, gather_adapter
from llmft_core.checkpoint.shards import MAX_SHARD, Shard, divide

if TYPE_CHECKING:
    import torch

    from llmft_core.extensions import Engine
    from llmft_core.plan import RunPlan

Keep = Callable[[str, "dict[str, torch.Tensor]"], None]
"""Takes one file: its name, and its tensors by name, on the CPU."""


@dataclass(frozen=True)
class Layout:
    """What a checkpoint will hold, equal on all ranks."""

    shards: list[Shard]
    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor by name, persistent buffers included."""
    buffers: frozenset[str]
    """Those of them that are buffers: written in their own type, in the first file."""
    dtype: torch.dtype
    trained: frozenset[str]
    config: Any
    """The model's configuration objects of transformers, which are written as JSON."""
    generation_config: Any
    adapter: AdapterStart | None = None
    """Where the checkpoint is an adapter: its tensors, alone."""

    @property
    def writers(self) -> int:
        """Ranks 0 to this number, excluded, write files."""
        return 1 + max(shard.writer for shard in self.shards)

    def bytes_of(self, rank: int) -> int:
        """Bytes of the files that this rank writes."""
        names = [name for shard in self.shards if shard.writer == rank for name in shard.names]
        return sum(math.prod(self.shapes[name]) * self.dtype.itemsize for name in names)


def lay_out(
    engine: Engine, plan: RunPlan, world_size: int, max_shard: int = MAX_SHARD, start: AdapterStart | None = None
) -> Layout:
    """Divide the model, or the adapter, into files and the files among the ranks."""
    if start is not None:
        return adapter_layout(engine, start)
    dtype, model, shapes = written_dtype(plan), engine.bare_model, engine.shapes()
    buffers = persistent_buffers(model)
    return Layout(
        shards=divide(shapes, dtype.itemsize, world_size, max_shard),
        shapes={**shapes, **{name: tuple(buffer.shape) for name, buffer in buffers.items()}},
        buffers=frozenset(buffers),
        dtype=dtype,
        trained=frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        config=model.config,
        generation_config=getattr(model, "generation_config", None),
    )


def adapter_layout(engine: Engine, start: AdapterStart) -> Layout:
    """PEFT's: one file, by rank 0, in fp32, which an adapter is small enough for."""
    import torch

    shapes = engine.shapes()
    own = {name: shapes[parameter] for parameter, name in start.adapter.tensors.items()}
    return Layout(
        shards=[Shard(ADAPTER_FILE, tuple(own), writer=0)],
        shapes=own,
        buffers=frozenset(),
        dtype=torch.float32,
        trained=frozenset(own),
        config=engine.bare_model.config,
        generation_config=getattr(engine.bare_model, "generation_config", None),
        adapter=start,
    )


def gather(engine: Engine, layout: Layout, rank: int, keep: Keep) -> None:
    """Gather the weights file by file, each on the rank that writes it, which hands it to `keep`. Collective: the
    others wait while a rank keeps a file."""
    for shard in layout.shards:
        if layout.adapter is not None:
            tensors = gather_adapter(engine, layout.adapter.adapter, shard.writer)
        else:
            tensors = engine.gathered(shard.names, layout.dtype, rank=shard.writer)
        if rank == shard.writer:
            if layout.buffers and shard is layout.shards[0]:
                buffers = persistent_buffers(engine.bare_model)
                tensors |= {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
            keep(shard.file, tensors)
        del tensors  # else this file would still be in memory while the next one is gathered


def written_dtype(plan: RunPlan) -> torch.dtype:
    """The type of the written weights."""
    import torch

    name = plan.checkpoint.dtype if plan.checkpoint.dtype != "auto" else plan.precision
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[str(name)]


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state dictionary; no strategy partitions them."""
    kept = set(model.state_dict().keys())
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
