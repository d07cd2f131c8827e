"""The learning rate is a pure function of the plan and the optimizer step."""

from __future__ import annotations

import pytest

from llmft_core.plan import RunPlan
from llmft_core.train.schedule import learning_rate


def plan(**settings: object) -> RunPlan:
    return RunPlan.from_json({"lr": 1.0, "warmup-steps": 4, **settings})


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_to_the_peak(schedule: str) -> None:
    rates = [learning_rate(plan(schedule=schedule), step, 20) for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear_falls_in_equal_steps_and_never_reaches_zero() -> None:
    rates = [learning_rate(plan(schedule="linear"), step, 20) for step in range(4, 20)]
    assert rates == pytest.approx([1 - k / 16 for k in range(16)])
    assert rates[-1] > 0


def test_cosine_is_half_the_peak_in_the_middle() -> None:
    assert learning_rate(plan(schedule="cosine"), 12, 20) == pytest.approx(0.5)
    assert 0 < learning_rate(plan(schedule="cosine"), 19, 20) < 0.01


def test_constant_stays() -> None:
    assert learning_rate(plan(schedule="constant"), 19, 20) == 1.0


def test_world_size_and_accumulation_do_not_enter() -> None:
    one = [learning_rate(plan(**{"global-batch": 8, "workers": 1, "micro-batch": 1}), s, 9) for s in range(9)]
    two = [learning_rate(plan(**{"global-batch": 8, "workers": 8, "micro-batch": 1}), s, 9) for s in range(9)]
    assert one == two
