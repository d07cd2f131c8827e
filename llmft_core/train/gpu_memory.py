"""Out of GPU memory: how much there was at the peak, what held it, and which flags help most in this plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError
from llmft_core.extensions import Engine, Method, Strategy
from llmft_core.plan import RunPlan
from llmft_core.report import words
from llmft_core.train.method import setting_of
from llmft_core.train.refusals import refusals
from llmft_core.values import Placement, Precision

Applies = Callable[[RunPlan, Placement], bool]
"""Whether a plan, which differs from the run's in one remedy, would be taken."""

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
    has_bf16: bool = True
    """Whether the GPU computes in bf16."""

    @property
    def rest(self) -> int:
        """What is neither: activations, gathered weights, buffers."""
        return max(0, self.peak - sum(self.held.values()))


def measured(engine: Engine) -> GpuMemory:
    """Of this rank's GPU. What an engine that is not prepared holds is the model that is being loaded."""
    statistics = torch.cuda.memory_stats()
    peak = int(statistics["allocated_bytes.all.peak"])
    held = {kind: on_gpu(tensors) for kind, tensors in engine.holdings().items()} or {"weights": peak}
    reserved, total = int(statistics["reserved_bytes.all.peak"]), torch.cuda.mem_get_info()[1]
    return GpuMemory(peak, reserved, total, held, torch.cuda.is_bf16_supported(including_emulation=False))


def on_gpu(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of those of the tensors that lie on a GPU, memory that several of them share counted once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def out_of_memory(
    plan: RunPlan, placement: Placement, memory: GpuMemory, applies: Applies, host: str, said: str
) -> str:
    """The error in one line. `said`: PyTorch's own first sentence."""
    parts = ", ".join(f"{kind} {words.size(size)}" for kind, size in memory.held.items() if size)
    held = f"{parts}, activations and buffers {words.size(memory.rest)}" if parts else "activations and buffers"
    return (
        f"out of GPU memory on {host} ({said.rstrip('.')}): at the peak {words.size(memory.peak)} were in use and "
        f"{words.size(memory.reserved)} reserved of {words.size(memory.total)}, held by {held}; what helps most: "
        f"{'; '.join(remedies(plan, placement, memory, applies))}"
    )


def applies_to(catalog: Catalog, special_ids: tuple[int, ...], plan: RunPlan, placement: Placement) -> bool:
    """Whether neither the strategy nor the method of a plan refuses it."""
    try:
        strategy: Strategy = catalog.create("strategy", plan.strategy or {})
        method: Method = catalog.create("method", plan.method)
    except InputError:  # its plugin is disabled, or does not know an option
        return False
    setting = setting_of(plan, placement, special_ids, catalog)
    return not refusals(plan, strategy, placement) and not method.problems(setting)


@dataclass(frozen=True)
class Remedy:
    """Flags, what they free of this GPU in bytes (about), and what becomes of the plan and the placement with them."""

    flags: str
    frees: float
    plan: RunPlan
    placement: Placement


def remedies(plan: RunPlan, placement: Placement, memory: GpuMemory, applies: Applies) -> list[str]:
    """The three flags that free most of this GPU, the best first: none that is set already, and none that the run
    would refuse. The global batch stays the same; what is trained too, but for --method lora, which is for runs whose
    memory goes to training all weights, and for the context length, which comes last."""
    found = [one for one in candidates(plan, placement, memory) if one.frees and applies(one.plan, one.placement)]
    best = [one.flags for one in sorted(found, key=lambda one: -one.frees)]
    return [*best, f"a shorter --context-length (now {plan.context_length})"][:3]


def candidates(plan: RunPlan, placement: Placement, memory: GpuMemory) -> list[Remedy]:
    """What is not set already, in no order."""
    weights, gradients, optimizer = (memory.held.get(kind, 0) for kind in ("weights", "gradients", "optimizer"))
    ranks, rest, chosen = placement.world_size, memory.rest, plan.strategy or {}
    model, name = weights + gradients + optimizer, chosen.get("name")
    found: list[Remedy] = []

    def add(flags: str, frees: float, to: Placement = placement, **changed: Any) -> None:
        found.append(Remedy(flags, frees, plan.model_copy(update=changed), to))

    def strategy(frees: float, options: Mapping[str, str]) -> None:
        """The two stages of ZeRO have the same options; another strategy's go with it."""
        kept = chosen if name in ("zero-2", "zero-3") else {}
        flags = (f"--strategy{'' if key == 'name' else f'.{key}'} {value}" for key, value in options.items())
        add(" ".join(flags), frees, strategy={**kept, **options})

    if not plan.gradient_checkpointing:
        add("--gradient-checkpointing", RECOMPUTED * rest, gradient_checkpointing=True)
    if placement.micro_batch > 1:
        smaller = placement.for_world_size(ranks, 1)
        add(f"--micro-batch 1 (now {placement.micro_batch})", rest * (1 - 1 / placement.micro_batch), smaller)
    if placement.precision == "fp32":
        half: Precision = "bf16" if memory.has_bf16 else "fp16"
        add(f"--precision {half}", rest / 2, replace(placement, precision=half), precision=half)
    if name == "zero-3":
        strategy(optimizer, {"offload-optimizer": "cpu"})
        strategy(weights, {"offload-params": "cpu"})
        if placement.global_batch > ranks:
            add(f"more --workers (now {ranks})", model / 2)
    elif name == "zero-2":
        strategy(optimizer, {"offload-optimizer": "cpu"})
        strategy(weights * (1 - 1 / ranks), {"name": "zero-3"})
    elif ranks > 1:
        strategy(model * (1 - 1 / ranks), {"name": "zero-3"})
    else:
        strategy(model, {"name": "zero-3", "offload": "all"})
    if plan.method["name"] == "full" and gradients + optimizer > max(weights, rest):
        add("--method lora (trains an adapter, not all weights)", gradients + optimizer, method={"name": "lora"})
    return found
