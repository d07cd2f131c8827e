"""States for exact resume, in plain gloo processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import on_ranks
from resuming import TOTAL, VOCABULARY, train_on
from tables import tiny_llama

AT = TOTAL // 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), VOCABULARY)


@pytest.mark.parametrize("strategy", ["ddp", "zero-2", "zero-3"])
def test_a_resumed_run_is_the_same_bit_for_bit(
    strategy: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    runs = {precision: str(tmp_path / precision) for precision in ("fp32", "bf16")}
    cases = [
        (strategy, precision, str(base), 2, runs[precision], step) for precision in ("fp32", "bf16") for step in (0, AT)
    ]
    ranks = on_ranks(2, train_on, cases)
    for straight_number, precision in ((0, "fp32"), (2, "bf16")):
        for answers in ranks:
            straight, resumed = answers[straight_number], answers[straight_number + 1]
            assert straight["fragments"].keys() == resumed["fragments"].keys() != set()
            for key, values in straight["fragments"].items():
                assert np.array_equal(values, resumed["fragments"][key]), key
            assert straight["counters"] == resumed["counters"] == {"optimizer_steps": TOTAL}
        straight, resumed = (ranks[0][straight_number + number] for number in (0, 1))
        assert resumed["loss"] == straight["loss"][AT:]
        assert straight["states"] == ["state_00000"]
        manifest = json.loads((tmp_path / precision / "state_00000" / "manifest.json").read_text())
        assert (tmp_path / precision / "state_00000" / ".is_state").is_file()
        kinds = {key.split("/")[0] for held in manifest["fragments"].values() for key in held}
        assert kinds == {"master", "exp_avg", "exp_avg_sq"}
