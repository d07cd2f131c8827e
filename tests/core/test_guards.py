"""Steps that are not finite, and losses that jump, in plain gloo processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guarding import VOCABULARY, guarded
from pydantic import ValidationError
from ranks import on_ranks
from tables import tiny_llama

from llmft_core.plan import RunPlan
from llmft_core.train.guards import with_its_gradient
from llmft_core.train.spikes import LEAST, WINDOW, SpikeDetector


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base"), VOCABULARY))


def case(base: str, run: Path, strategy: str = "ddp", precision: str = "fp32", **more: Any) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "precision": precision,
        "base": base,
        "run": str(run),
        "world_size": 2,
        "steps": 4,
        "wrong": [],
        **more,
    }


@pytest.mark.parametrize("strategy", ["ddp", "zero-2", "zero-3"])
def test_a_skipped_step_leaves_nothing_behind_but_its_rows(strategy: str, base: str, tmp_path: Path) -> None:
    """The loss of one micro-batch of rank 1, or the gradient of one of rank 0: the runs are one afterwards."""
    settings = {"on-nonfinite": "skip:1"}
    by_loss, by_gradient = (
        case(base, tmp_path / kind, strategy, "bf16", wrong=[(1, micro_batch, rank, kind)], settings=settings)
        for kind, rank, micro_batch in (("nan", 1, 1), ("gradient", 0, 0))
    )
    ranks = on_ranks(2, guarded, [by_loss, by_gradient])
    for one, other in ranks:
        assert one["error"] == other["error"] == ""
        assert one["counters"] == other["counters"] == {"optimizer_steps": 3.0}
        assert one["fragments"].keys() == other["fragments"].keys() != set()
        for key, values in one["fragments"].items():
            assert np.isfinite(values).all()
            assert np.array_equal(values, other["fragments"][key]), key
    one, other = ranks[0]
    for answer in (one, other):
        assert [metrics["train/skipped"] for metrics in answer["metrics"]] == [0.0, 1.0, 0.0, 0.0]
    assert [math.isfinite(metrics["train/loss"]) for metrics in one["metrics"]] == [True, False, True, True]
    assert [metrics["train/learning_rate"] for metrics in one["metrics"]] == [
        metrics["train/learning_rate"] for metrics in other["metrics"]
    ]

    file = tmp_path / "nan" / "aside" / "step_00002_nonfinite.jsonl"
    (told,) = one["warnings"]
    assert told.startswith("optimizer step 2 is not applied on any rank: loss nan, gradient norm ")
    assert f"; not finite: micro-batch 1 of rank 1; the rows are in {file}; 1 of 1 such steps" in told
    assert [len(answer["warnings"]) for answer in ranks[1]] == [0, 0]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert (lines[0]["rank"], lines[0]["micro_batch"], lines[0]["loss"]) == (1, 1, "nan")
    assert sorted((line["rank"], line["micro_batch"]) for line in lines) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for line in lines:
        assert line["file"] == "table"
        assert 1 <= line["line"] <= 16
        assert len(line["ids"]) == line["tokens"] > line["trained_tokens"]
    assert [line["loss"] for line in lines[1:]] == sorted((line["loss"] for line in lines[1:]), reverse=True)

    assert "the loss of every micro-batch is finite, the gradient is not" in other["warnings"][0]
    lines = [json.loads(line) for line in (tmp_path / "gradient" / "aside" / file.name).read_text().splitlines()]
    trained = sum(line["trained_tokens"] for line in lines)
    mean = sum(line["loss"] * line["trained_tokens"] for line in lines) / trained
    assert mean == pytest.approx(other["metrics"][1]["train/loss"], rel=1e-5)


def test_what_may_be_skipped_is_counted_over_the_whole_run(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    settings = {"on-nonfinite": "skip:1", "state": {"every-steps": 2, "every-minutes": 0, "keep-last": 9}}
    first = case(base, tmp_path / "run", wrong=[(0, 0, 0, "nan")], settings=settings)
    again = {**first, "from_state": True, "wrong": [(3, 1, 1, "nan")]}
    stop = case(base, tmp_path / "stop", "zero-3", wrong=[(2, 0, 1, "nan")])
    ranks = on_ranks(2, guarded, [first, again, stop])
    progress = json.loads((tmp_path / "run" / "state_00000" / "progress.json").read_text())
    assert (progress["step"], progress["counters"]) == (2, {"optimizer_steps": 1.0})
    assert progress["guards"]["skipped"] == 1
    assert len(progress["guards"]["spikes"]["losses"]) == 1
    for went_on, resumed, stopped in ranks:
        assert went_on["error"] == ""
        assert "2 such steps are more than --on-nonfinite skip:1 allows: look at these rows" in resumed["error"]
        assert stopped["error"].startswith("optimizer step 3 is not applied on any rank: loss nan")
        assert stopped["error"].endswith("by --on-nonfinite skip:3")
        assert stopped["counters"] == {"optimizer_steps": 2.0}
    assert (tmp_path / "stop" / "aside" / "step_00003_nonfinite.jsonl").is_file()
    assert len(ranks[0][2]["metrics"]) == 2


def test_rows_that_cannot_be_written_aside_are_a_warning(base: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "aside").write_text("a file, where a folder is wanted")
    wrong = case(base, tmp_path / "run", world_size=1, wrong=[(0, 0, 0, "nan")])
    (answer,) = on_ranks(1, guarded, [wrong])[0]
    (told,) = answer["warnings"]
    assert told.startswith("step_00001_nonfinite.jsonl could not be written: ")
    assert "optimizer step 1 is not applied on any rank: loss nan" in answer["error"]
    assert "the rows are in" not in answer["error"]


def test_a_jump_of_the_loss_is_told_once_and_by_a_resumed_run_alike(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    settings = {"lr": 1e-4, "state": {"every-steps": 18, "every-minutes": 0}}
    wrong = [(step, micro_batch, 0, "jump") for step in (20, 21) for micro_batch in (2, 3)]
    straight = case(base, tmp_path / "run", world_size=1, steps=24, settings=settings, wrong=wrong)
    found, resumed = on_ranks(1, guarded, [straight, {**straight, "from_state": True}])[0]
    (told,) = found["warnings"]
    usual = float(np.median([metrics["train/loss"] for metrics in found["metrics"][:20]]))
    loss = found["metrics"][20]["train/loss"]
    file = tmp_path / "run" / "aside" / "step_00021_spike.jsonl"
    assert told == (
        f"optimizer step 21: the loss jumped to {loss:.4f} from {usual:.4f}, the median of the steps before; the rows "
        f"are in {file}, the worst first"
    )
    assert resumed["warnings"] == [told]
    assert len(resumed["metrics"]) == 6
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["micro_batch"] in (2, 3)
    assert [line["loss"] for line in lines] == sorted((line["loss"] for line in lines), reverse=True)


def test_spikes_among_noise() -> None:
    random = np.random.default_rng(0)
    noisy = [2.0 * math.exp(-step / 400) + 0.1 * random.standard_normal() for step in range(1000)]
    quiet = SpikeDetector({})
    assert [step for step, loss in enumerate(noisy) if quiet.look(loss) is not None] == []
    detector = SpikeDetector({})
    spiky = [loss + (3.0 if 500 <= step < 505 or step == 700 else 0.0) for step, loss in enumerate(noisy)]
    assert [step for step, loss in enumerate(spiky) if detector.look(loss) is not None] == [500, 700]
    risen = SpikeDetector({})
    assert [step for step in range(400) if risen.look(1.0 if step < 200 else 1.5) is not None] == [200]
    assert risen.look(1.5) is None
    assert risen.memory == {"losses": [1.5] * WINDOW, "in_spike": False}
    early = SpikeDetector({})
    assert [early.look(loss) for loss in [1.0] * (LEAST - 1) + [9.0]] == [None] * LEAST


def test_a_detector_goes_on_from_what_it_remembers() -> None:
    losses = [1.0 + 0.01 * (step % 5) for step in range(40)]
    whole, first = SpikeDetector({}), SpikeDetector({})
    for loss in losses:
        assert whole.look(loss) is None
        assert first.look(loss) is None
    assert whole.look(4.0) == first.look(4.0) is not None
    second = SpikeDetector(json.loads(json.dumps(first.memory)))
    assert second.look(4.0) is whole.look(4.0) is None
    assert second.look(1.0) is whole.look(1.0) is None
    assert second.look(4.0) == whole.look(4.0) is not None


def test_a_loss_that_is_not_finite_has_no_finite_gradient() -> None:
    for constant in (math.inf, -math.inf, math.nan):
        weight = torch.ones(3, requires_grad=True)
        with_its_gradient(weight.sum() + constant).backward()
        assert not torch.isfinite(weight.grad).any()
    weight = torch.tensor([0.1, 0.7], requires_grad=True)
    loss = (weight**3).sum()
    assert torch.equal(with_its_gradient(loss), loss)
    with_its_gradient(loss).backward()
    expected = torch.tensor([0.1, 0.7], requires_grad=True)
    (expected**3).sum().backward()
    assert torch.equal(weight.grad, expected.grad)


def test_what_may_be_written_for_on_nonfinite() -> None:
    for given, kept, steps in (("stop", "stop", 0), ("skip:3", "skip:3", 3), ("skip 12", "skip:12", 12)):
        plan = RunPlan.from_json({"on-nonfinite": given})
        assert (plan.on_nonfinite, plan.nonfinite_steps) == (kept, steps)
    for wrong in ("skip", "skip:0", "skip:-1", "ignore", 3):
        with pytest.raises(ValidationError, match=r"write stop, or skip:N .* such as skip:3"):
            RunPlan.from_json({"on-nonfinite": wrong})
