"""The out-of-memory error, with numbers as an 80 GB GPU gives them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from holding import hold
from ranks import on_ranks
from tables import tiny_llama
from transformers import AutoModelForCausalLM

from llmft_core import Placement
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.train.gpu_memory import GpuMemory, applies_to, on_gpu, out_of_memory, remedies

GB = 10**9
VOCABULARY = 101  # that of the job, so that no row is added
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
LLAMA_7B = {"weights": 27 * GB, "gradients": 27 * GB}  # ddp, fp32, before the first step

LORA = "--method lora (trains an adapter, not all weights)"


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(load_plugins())


def asked(
    catalog: Catalog, strategy: Any, memory: GpuMemory, ranks: int = 8, micro_batch: int = 8, **settings: Any
) -> list[str]:
    plan = RunPlan.from_json({"strategy": strategy, "context-length": 512, **settings})
    placement = Placement(ranks, "cuda", plan.precision or "bf16", micro_batch, 1, 1.0)
    return remedies(plan, placement, memory, partial(applies_to, catalog, ()))


def test_the_error_names_the_peak_what_held_it_and_three_flags(catalog: Catalog) -> None:
    plan = RunPlan.from_json({"strategy": "zero-3", "context-length": 512})
    held = {"weights": 3_500_000_000, "gradients": 3_500_000_000, "optimizer": 21 * GB}
    memory = GpuMemory(78 * GB, 79 * GB, 85 * GB, held)
    said = "CUDA out of memory. Tried to allocate 2.00 GiB."
    placement, applies = Placement(4, "cuda", "bf16", 8, 1, 1.0), partial(applies_to, catalog, ())
    error = out_of_memory(plan, placement, memory, applies, "node-1", said)
    assert error == (
        "out of GPU memory on node-1 (CUDA out of memory. Tried to allocate 2.00 GiB): at the peak 78.0 GB were in use "
        "and 79.0 GB reserved of 85.0 GB, held by weights 3.5 GB, gradients 3.5 GB, optimizer 21.0 GB, activations and "
        "buffers 50.0 GB; what helps most: --micro-batch 1 (now 8); --gradient-checkpointing; "
        "--strategy.offload-optimizer cpu"
    )


@pytest.mark.parametrize(
    ("strategy", "held", "settings", "expected"),
    [
        # A model that does not fit: it is spread, whatever its activations do.
        ("ddp", LLAMA_7B, {}, ["--strategy zero-3", "--micro-batch 1 (now 8)", "--gradient-checkpointing"]),
        (
            "ddp",
            LLAMA_7B,
            {"ranks": 1, "micro_batch": 1, "gradient-checkpointing": True},
            ["--strategy zero-3 --strategy.offload all", "a shorter --context-length (now 512)"],
        ),
        # While it is loaded nothing is known but its weights.
        ("ddp", {"weights": 78 * GB}, {"ranks": 2}, ["--strategy zero-3", "a shorter --context-length (now 512)"]),
        (
            "zero-2",
            {"weights": 14 * GB, "gradients": 4 * GB, "optimizer": 40 * GB},
            {"gradient-checkpointing": True, "micro_batch": 1},
            [LORA, "--strategy.offload-optimizer cpu", "--strategy zero-3"],
        ),
        # What is offloaded already holds nothing on the GPU and is not proposed.
        (
            {"name": "zero-3", "offload": "all"},
            {"weights": 0, "gradients": 0, "optimizer": 0},
            {"precision": "fp32", "micro_batch": 2},
            ["--gradient-checkpointing", "--micro-batch 1 (now 2)", "--precision bf16"],
        ),
        (
            {"name": "zero-3", "offload": "all"},
            {"weights": 0, "gradients": 0, "optimizer": 0},
            {"gradient-checkpointing": True, "micro_batch": 1},
            ["a shorter --context-length (now 512)"],
        ),
        # Where training all weights takes most, training fewer is named, as what it is.
        (
            "zero-2",
            {"weights": 14 * GB, "gradients": 4 * GB, "optimizer": 40 * GB},
            {"micro_batch": 1},
            [LORA, "--strategy.offload-optimizer cpu", "--gradient-checkpointing"],
        ),
        (
            "zero-2",
            {"weights": 14 * GB, "gradients": 4 * GB, "optimizer": 40 * GB},
            {"micro_batch": 1, "method": {"name": "lora"}},
            ["--strategy.offload-optimizer cpu", "--gradient-checkpointing", "--strategy zero-3"],
        ),
        # A file that says so itself would contradict the flags.
        (
            {
                "name": "zero-3",
                "config": {
                    "train_micro_batch_size_per_gpu": 8,
                    "zero_optimization": {"offload_optimizer": {"device": "none"}},
                },
            },
            {"weights": 4 * GB, "gradients": 4 * GB, "optimizer": 10 * GB},
            {},
            ["--gradient-checkpointing", "more --workers (now 8)", "--strategy.offload-params cpu"],
        ),
        # Each rank has one row of the global batch already.
        (
            "zero-3",
            {"weights": 20 * GB, "gradients": 0, "optimizer": 0},
            {"micro_batch": 1},
            ["--gradient-checkpointing", "--strategy.offload-params cpu", "a shorter --context-length (now 512)"],
        ),
    ],
)
def test_the_flags_are_those_that_free_most(
    strategy: Any, held: dict[str, int], settings: dict[str, Any], expected: list[str], catalog: Catalog
) -> None:
    found = asked(catalog, strategy, GpuMemory(78 * GB, 79 * GB, 85 * GB, held), **settings)
    assert found[: len(expected)] == expected
    assert len(found) <= 3


def test_no_flag_is_named_that_this_run_cannot_have(catalog: Catalog) -> None:
    memory = GpuMemory(78 * GB, 79 * GB, 85 * GB, LLAMA_7B)
    without = Catalog(load_plugins(["zero"]))
    assert not any("--strategy" in flags for flags in asked(without, "ddp", memory))
    assert any("--strategy zero-3" in flags for flags in asked(catalog, "ddp", memory))
    assert not any("--strategy zero-3" in flags for flags in asked(catalog, "ddp", memory, compile=True))
    old = GpuMemory(78 * GB, 79 * GB, 85 * GB, {}, has_bf16=False)
    settings = {"precision": "fp32", "gradient-checkpointing": True, "micro_batch": 1}
    assert asked(catalog, "ddp", old, **settings)[0] == "--precision fp16"
    assert asked(catalog, "ddp", replace(old, has_bf16=True), **settings)[0] == "--precision bf16"


def test_a_strategy_of_a_stranger_is_left_with_all_its_options() -> None:
    """What it would refuse is its own affair; what it is told besides is not known to another one."""
    seen: list[RunPlan] = []

    def applies(plan: RunPlan, placement: Placement) -> bool:
        seen.append(plan)
        return True

    plan = RunPlan.from_json({"strategy": {"name": "somebodys", "shards": 3}})
    remedies(plan, Placement(8, "cuda", "bf16", 8, 1, 1.0), GpuMemory(78 * GB, 79 * GB, 85 * GB, LLAMA_7B), applies)
    assert {"name": "zero-3"} in [one.strategy for one in seen]
    assert {"name": "somebodys", "shards": 3} in [one.strategy for one in seen]


def test_engines_tell_what_they_hold(tmp_path: Path) -> None:
    base = str(tiny_llama(tmp_path / "base", VOCABULARY))
    choices: list[Any] = ["ddp", "zero-2", {"name": "zero-3", "offload": "all", "config": PARTITIONED}]
    ranks = on_ranks(2, hold, 2, choices, base)
    total = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    none = {"gradients": 0, "optimizer": 0}
    for prepared, middle, stepped in (rank[0] for rank in ranks):  # ddp
        assert prepared == {"weights": total, **none}
        assert middle == {"weights": total, "gradients": total, "optimizer": 0}
        assert stepped["weights"] == total
        assert stepped["optimizer"] >= 2 * total  # moments, and counters of steps
    part = pytest.approx(total / 2, rel=0.02)  # padding
    for prepared, middle, stepped in (rank[1] for rank in ranks):  # zero-2
        assert prepared == {"weights": total, "gradients": 0, "optimizer": part}
        assert middle["gradients"] >= total / 2
        assert stepped["optimizer"] == pytest.approx(3 * total / 2, rel=0.02)
    for prepared, middle, stepped in (rank[2] for rank in ranks):  # zero-3
        assert prepared["weights"] == prepared["optimizer"] == part
        assert middle["gradients"] >= total * 0.49
        assert stepped["optimizer"] == pytest.approx(3 * total / 2, rel=0.02)


def test_a_cpus_tensors_are_not_counted() -> None:
    assert on_gpu([torch.zeros(3), None]) == 0
