"""Out of GPU memory: how much there was at the peak, what held it, and which flags help most in this plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from llmft_core.extensions import Engine
from llmft_core.plan import RunPlan
from llmft_core.report import words
from llmft_core.values import Placement

RECOMPUTED = 0.7
"""Share of the activations of a transformer that gradient checkpointing does not keep, about.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.
"""


@dataclass(frozen=True)
class GpuMemory:
    """One GPU when it had no more, in bytes."""

    peak: int
    """Most that tensors took at one time."""
    reserved: int
    """Most that PyTorch had taken from the GPU, with what lay idle between tensors."""
    total: int
    held: Mapping[str, int]
    """Weights, gradients and optimizer of this rank."""

    @property
    def rest(self) -> int:
        """What is neither: activations, gathered weights, buffers."""
        return max(0, self.peak - sum(self.held.values()))


def measured(engine: Engine) -> GpuMemory:
    """Of this rank's GPU. What an engine that is not prepared holds is the model that is being loaded."""
    statistics = torch.cuda.memory_stats()
    peak = int(statistics["allocated_bytes.all.peak"])
    held = {kind: on_gpu(tensors) for kind, tensors in engine.holdings().items()} or {"weights": peak}
    return GpuMemory(peak, int(statistics["reserved_bytes.all.peak"]), torch.cuda.mem_get_info()[1], held)


def on_gpu(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of those of the tensors that lie on a GPU, memory that several of them share counted once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def out_of_memory(plan: RunPlan, placement: Placement, memory: GpuMemory, host: str, said: str) -> str:
    """The error in one line. `said`: PyTorch's own first sentence."""
    parts = ", ".join(f"{kind} {words.size(size)}" for kind, size in memory.held.items() if size)
    held = f"{parts}, activations and buffers {words.size(memory.rest)}" if parts else "activations and buffers"
    return (
        f"out of GPU memory on {host} ({said.rstrip('.')}): at the peak {words.size(memory.peak)} were in use and "
        f"{words.size(memory.reserved)} reserved of {words.size(memory.total)}, held by {held}; what helps most: "
        f"{'; '.join(remedies(plan, placement, memory))}"
    )


def remedies(plan: RunPlan, placement: Placement, memory: GpuMemory) -> list[str]:
    """The three flags that free most of this GPU, the best first; none that is set already. The global batch and what
    is trained stay the same, but for the context length, which comes last."""
    weights, gradients, optimizer = (memory.held.get(kind, 0) for kind in ("weights", "gradients", "optimizer"))
    ranks, rest, strategy = placement.world_size, memory.rest, (plan.strategy or {}).get("name")
    model = weights + gradients + optimizer
    saved: dict[str, float] = {}  # flag → bytes, about
    if not plan.gradient_checkpointing:
        saved["--gradient-checkpointing"] = RECOMPUTED * rest
    if placement.micro_batch > 1:
        saved[f"--micro-batch 1 (now {placement.micro_batch})"] = rest * (1 - 1 / placement.micro_batch)
    if placement.precision == "fp32":
        saved["--precision bf16"] = rest / 2
    if strategy == "zero-3":
        saved["--strategy.offload-optimizer cpu"] = optimizer
        saved["--strategy.offload-params cpu"] = weights
        saved[f"more --workers (now {ranks})"] = model / 2
    elif strategy == "zero-2":
        saved["--strategy.offload-optimizer cpu"] = optimizer
        saved["--strategy zero-3"] = weights * (1 - 1 / ranks)
    elif ranks > 1:
        saved["--strategy zero-3"] = model * (1 - 1 / ranks)
    else:
        saved["--strategy zero-3 --strategy.offload all"] = model
    best = sorted((flag for flag, size in saved.items() if size), key=lambda flag: -saved[flag])
    return [*best, f"a shorter --context-length (now {plan.context_length})"][:3]
