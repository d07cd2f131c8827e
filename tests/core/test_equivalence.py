"""Strategies, precisions, methods and numbers of workers are ways to compute the same: the losses of all agree."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from resuming import VOCABULARY, train_on
from tables import tiny_llama

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
