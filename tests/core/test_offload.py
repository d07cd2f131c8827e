"""Optimizer and weights in host memory: the same numbers, and as exact to resume. On CPU it is one memory, and yet
DeepSpeed takes the ways of offloading; what only a GPU shows is in tests/gpu."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import on_ranks
from resuming import TOTAL, VOCABULARY, train_on
from tables import tiny_llama

AT = TOTAL // 2
# The smallest parameter is partitioned too, and the optimizer works through several groups of each kind.
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 4000}}
SAME_NUMBER = {"fp32": 1e-6, "bf16": 1e-4}
"""How far a master may be off after all steps. Norms are summed group by group, so clipping differs in its last bit; in
bf16 a weight may then be rounded the other way. 1e-4 is a hundredth of what one step moves a weight at this rate."""
CHOICES: dict[str, tuple[dict[str, Any], ...]] = {
    "zero-2": ({"name": "zero-2"}, {"name": "zero-2", "offload-optimizer": "cpu"}),
    "zero-3": (
        {"name": "zero-3"},
        {"name": "zero-3", "offload": "all", "config": PARTITIONED},
        {"name": "zero-3", "offload-params": "cpu"},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base"), VOCABULARY))


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[list[dict[str, Any]]]]:
    """(stage, precision) → each rank's answers: without offloading, and then of each choice straight through and from
    the middle on."""
    cases: list[Any] = []
    slices = {}
    for kind in product(CHOICES, SAME_NUMBER):
        stage, precision = kind
        folder, first = tmp_path_factory.mktemp("runs"), len(cases)
        plain, *offloaded = CHOICES[stage]
        cases.append((plain, precision, base, 2, str(folder / "plain"), 0))
        for number, choice in enumerate(offloaded):
            cases += [(choice, precision, base, 2, str(folder / str(number)), step) for step in (0, AT)]
        slices[kind] = slice(first, len(cases))
    ranks = on_ranks(2, train_on, cases)
    return {kind: [answers[one] for answers in ranks] for kind, one in slices.items()}


@pytest.mark.parametrize("precision", SAME_NUMBER)
@pytest.mark.parametrize("stage", CHOICES)
def test_offloading_changes_no_number_and_resumes_bit_for_bit(
    stage: str, precision: str, trained: dict[tuple[str, str], list[list[dict[str, Any]]]]
) -> None:
    answers = trained[stage, precision]
    for reference, *found in answers:
        for straight, resumed in zip(found[::2], found[1::2], strict=True):
            assert straight["counters"] == resumed["counters"] == {"optimizer_steps": TOTAL}
            assert straight["fragments"].keys() == resumed["fragments"].keys() == reference["fragments"].keys() != set()
            for key, values in straight["fragments"].items():
                assert np.array_equal(values, resumed["fragments"][key]), key
                assert values == pytest.approx(reference["fragments"][key], rel=1e-4, abs=SAME_NUMBER[precision]), key
    reference, *found = answers[0]
    for straight, resumed in zip(found[::2], found[1::2], strict=True):
        assert resumed["loss"] == straight["loss"][AT:]
        assert straight["loss"] == pytest.approx(reference["loss"], rel={"fp32": 1e-6, "bf16": 1e-4}[precision])


def test_another_strategy_and_world_size_go_on_from_an_offloaded_state(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    run = str(tmp_path / "run")
    offloaded = CHOICES["zero-3"][1]
    (straight,) = on_ranks(2, train_on, [(offloaded, "fp32", base, 2, run, 0)])[0]
    others: list[Any] = ["ddp", CHOICES["zero-2"][1], "zero-3", offloaded]
    for resumed in on_ranks(1, train_on, [(choice, "fp32", base, 1, run, AT) for choice in others])[0]:
        assert resumed["loss"] == pytest.approx(straight["loss"][AT:], rel=1e-5)
