"""Strategies, precisions, methods and numbers of workers are ways to compute the same: the losses of all agree. What is
computed twice to save memory is the same to the last bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import on_ranks
from resuming import VOCABULARY, train_on
from tables import tiny_llama

from llmft_core.errors import LlmftError

STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "zero-2": "zero-2",
    "zero-3": "zero-3",
    "zero-3 + offload": {"name": "zero-3", "offload": "all"},
}
METHODS: dict[str, Any] = {"full": "full", "lora": {"name": "lora", "rank": 4}}
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3}
"""Of a loss, relative. In bf16 ddp rounds in other places than DeepSpeed: it keeps fp32 weights."""
STEPS = 10

Cell = tuple[str, str, str]
"""Strategy, precision, method."""
EVERYTHING: list[Cell] = list(product(STRATEGIES, TOLERANCES, METHODS))
DIAGONAL: list[Cell] = [
    ("ddp", "bf16", "lora"),
    ("zero-2", "fp32", "full"),
    ("zero-3", "bf16", "full"),
    ("zero-3 + offload", "fp32", "lora"),
]
REFERENCES: list[Cell] = [("ddp", precision, method) for precision, method in product(TOLERANCES, METHODS)]


def losses(world_size: int, base: Path, folder: Path, cells: list[Cell]) -> dict[Cell, list[float]]:
    cases = [
        (STRATEGIES[strategy], precision, str(base), world_size, str(folder), 0, STEPS, 0, METHODS[method], 1e-3)
        for strategy, precision, method in cells
    ]
    answers = on_ranks(world_size, train_on, cases)[0]
    return {cell: answer["loss"] for cell, answer in zip(cells, answers, strict=True)}


@pytest.mark.parametrize(
    "cells", [pytest.param(DIAGONAL, id="diagonal"), pytest.param(EVERYTHING, id="everything", marks=pytest.mark.slow)]
)
def test_the_losses_of_all_agree(cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    base = tiny_llama(tmp_path / "base", VOCABULARY)
    alone = losses(1, base, tmp_path / "run", list(dict.fromkeys([*REFERENCES, *cells])))
    for precision, tolerance in TOLERANCES.items():  # what is trained shows
        assert alone["ddp", precision, "full"] != pytest.approx(alone["ddp", precision, "lora"], rel=10 * tolerance)
    together = losses(2, base, tmp_path / "run", cells)
    for found in (alone, together):
        for (strategy, precision, method), values in found.items():
            reference = alone["ddp", precision, method]
            assert len(values) == STEPS
            assert values == pytest.approx(reference, rel=TOLERANCES[precision]), (strategy, precision, method)


RECOMPUTED: list[tuple[Any, Any]] = [
    ("ddp", "full"),
    ("zero-3", "full"),
    ("ddp", {"name": "lora", "rank": 4, "dropout": 0.1}),
    (STRATEGIES["zero-3 + offload"], {"name": "lora", "rank": 4, "dropout": 0.1}),
]
RECOMPUTED_STEPS = 3
CHUNK = 7  # positions: a micro-batch has several chunks, and the last is not full


def test_gradient_checkpointing_beside_the_chunked_loss_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of the loss's chunks are there before the backward pass begins; dropout is drawn a second time."""
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    base, run = str(tiny_llama(tmp_path / "base", VOCABULARY)), str(tmp_path / "run")
    cases = [
        (strategy, "fp32", base, 2, run, 0, RECOMPUTED_STEPS, 0, method, 1e-2, recompute, CHUNK)
        for strategy, method in RECOMPUTED
        for recompute in (False, True)
    ]
    for answers in on_ranks(2, train_on, cases):
        for choice, plain, recomputed in zip(RECOMPUTED, answers[::2], answers[1::2], strict=True):
            assert plain["layer_passes"] == RECOMPUTED_STEPS, choice  # one micro-batch on each rank
            assert recomputed["layer_passes"] == 2 * RECOMPUTED_STEPS, choice
            assert recomputed["loss"] == plain["loss"], choice
            assert recomputed["fragments"].keys() == plain["fragments"].keys() != set()
            for key, values in plain["fragments"].items():
                assert np.array_equal(recomputed["fragments"][key], values), (choice, key)


def test_a_model_that_cannot_compute_activations_again_is_refused() -> None:
    from transformers import CTRLConfig, CTRLLMHeadModel

    from llmft_core.train.model import recompute

    model = CTRLLMHeadModel(CTRLConfig(vocab_size=16, n_embd=8, dff=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(LlmftError, match=r"^--gradient-checkpointing: CTRLLMHeadModel cannot .*: leave the flag out"):
        recompute(model)
