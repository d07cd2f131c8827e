"""fp16: what a loss scaler remembers goes from run to run and from strategy to strategy. DeepSpeed's engines are real,
on the CPU; of `ddp` there is PyTorch's scaler alone, for accelerate's fp16 needs a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranks import on_ranks
from resuming import TOTAL, VOCABULARY
from scaling import overflow, train_in_fp16
from tables import tiny_llama

from llmft_plugins.strategies import ddp, zero_state

AT = TOTAL // 2
WINDOW = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base"), VOCABULARY))


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By rank: zero-2 and zero-3 straight through and from the middle on; zero-3 from zero-2's state, and zero-2 from
    one of ddp in fp32. A chunk of the loss has few positions."""
    folder = tmp_path_factory.mktemp("trained")
    runs = [("zero-2", "fp16", "zero-2"), ("zero-3", "fp16", "zero-3"), ("ddp", "fp32", "ddp")]
    more = [("zero-2", "fp16", "zero-2"), ("zero-3", "fp16", "zero-3"), ("zero-3", "fp16", "zero-2")]
    more.append(("zero-2", "fp16", "ddp"))
    cases = [(strategy, precision, base, 2, str(folder / run), 0) for strategy, precision, run in runs]
    cases += [(strategy, precision, base, 2, str(folder / run), AT) for strategy, precision, run in more]
    small = (TOTAL, AT, "full", 1e-3, False, 7)
    return on_ranks(2, train_in_fp16, [(*case, *small) for case in cases])


def test_a_resumed_run_is_the_same_bit_for_bit(trained: list[list[dict[str, Any]]]) -> None:
    for zero2, zero3, _, zero2_resumed, zero3_resumed, _, _ in trained:
        for straight, resumed in ((zero2, zero2_resumed), (zero3, zero3_resumed)):
            assert straight["fragments"].keys() == resumed["fragments"].keys() != set()
            for key, values in straight["fragments"].items():
                assert np.array_equal(values, resumed["fragments"][key]), key
            assert straight["counters"] == resumed["counters"]
            assert resumed["loss"] == straight["loss"][AT:]
            assert 0 < straight["counters"]["optimizer_steps"] <= TOTAL


def test_another_strategy_goes_on_and_another_precision_begins_to_scale(trained: list[list[dict[str, Any]]]) -> None:
    zero2, _, ddp_fp32, _, _, from_zero2, from_ddp = trained[0]
    assert from_zero2["loss"] == pytest.approx(zero2["loss"][AT:], rel=1e-3)
    assert from_zero2["counters"] == zero2["counters"]
    assert from_ddp["loss"] == pytest.approx(ddp_fp32["loss"][AT:], rel=2e-2)  # a step or two settle the scale
    assert from_ddp["counters"]["loss_scale"] > 1


@pytest.mark.parametrize("strategy", ["zero-2", "zero-3"])
def test_at_the_smallest_scale_steps_go_on_being_refused(strategy: str, base: str) -> None:
    """DeepSpeed's own exception, at the 18th in a row, would come before llmft's guard."""
    (found,) = on_ranks(1, overflow, strategy, base, 20)
    assert found["applied"] == [False] * 20 + [True]
    assert found["scales"][:2] == [2.0**16, 2.0**15]  # the first one is let pass
    assert found["scales"][16:] == [1.0] * 5
    assert found["counters"] == {"optimizer_steps": 1.0, "loss_scale": 1.0, "good_steps": 1.0, "hysteresis": 1.0}


def deepspeed_scaler() -> Any:
    """As DeepSpeed makes it."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    config = DeepSpeedFP16Config(enabled=True, initial_scale_power=16, loss_scale_window=WINDOW)
    return CreateLossScaler(torch.half, 0, True, config.dynamic_loss_scale_args())


def scales_of(scaler: Any, steps: int) -> list[float]:
    """The scale after each of so many steps that do not overflow."""
    scales = []
    for _ in range(steps):
        scaler.update_scale(False)
        scales.append(scaler.cur_scale)
    return scales


@pytest.mark.parametrize("before", range(2 * WINDOW + 3))
@pytest.mark.parametrize("last_overflow", [-1, 3])
def test_deepspeeds_scaler_goes_on_as_if_nothing_had_been(before: int, last_overflow: int) -> None:
    straight, resumed = deepspeed_scaler(), deepspeed_scaler()
    straight.last_overflow_iter, straight.cur_iter, straight.cur_hysteresis = last_overflow, last_overflow + 1, 1
    scales_of(straight, before)
    zero_state.restore_scaler(resumed, zero_state.scaler_counters(straight))
    assert resumed.cur_hysteresis == straight.cur_hysteresis
    assert scales_of(resumed, 3 * WINDOW) == scales_of(straight, 3 * WINDOW)


def torch_scaler(good_steps: int = 0, loss_scale: float = 2.0**16) -> Any:
    """PyTorch's, after so many steps that did not overflow."""
    import torch

    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, growth_interval=WINDOW)
    return stepped(scaler, good_steps)


def stepped(scaler: Any, steps: int) -> Any:
    import torch

    parameter = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter])
    for _ in range(steps):
        scaler.scale(parameter * 1.0).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return scaler


def test_pytorchs_scaler_goes_on_as_if_nothing_had_been() -> None:
    for before in range(WINDOW + 2):
        straight, resumed = torch_scaler(before), torch_scaler()
        ddp.restore_scaler(resumed, ddp.scaler_counters(straight))
        for _ in range(WINDOW + 1):
            assert stepped(resumed, 1).state_dict() == stepped(straight, 1).state_dict()


def test_each_scaler_goes_on_from_the_others_counters() -> None:
    zero, torchs = deepspeed_scaler(), torch_scaler()
    zero_state.restore_scaler(zero, ddp.scaler_counters(torch_scaler(3, 512.0)))
    assert zero_state.scaler_counters(zero) == {"loss_scale": 512.0, "good_steps": 3.0, "hysteresis": 2.0}
    ddp.restore_scaler(torchs, {"optimizer_steps": 9.0, **zero_state.scaler_counters(zero)})
    assert ddp.scaler_counters(torchs) == {"loss_scale": 512.0, "good_steps": 3.0}
    # A window longer than its own: it would never double again.
    ddp.restore_scaler(torchs, {"loss_scale": 512.0, "good_steps": 999.0})
    assert stepped(torchs, 1).get_scale() == 1024.0


def test_without_counters_of_a_scaler_it_begins_as_in_a_new_run() -> None:
    zero, torchs = deepspeed_scaler(), torch_scaler()
    zero_state.restore_scaler(zero, {"optimizer_steps": 9.0})
    ddp.restore_scaler(torchs, {"optimizer_steps": 9.0})
    assert zero_state.scaler_counters(zero) == zero_state.scaler_counters(deepspeed_scaler())
    assert ddp.scaler_counters(torchs) == ddp.scaler_counters(torch_scaler())
