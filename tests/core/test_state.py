"""States for exact resume, in plain gloo processes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from resuming import TOTAL, VOCABULARY, train_on
from tables import tiny_llama

from llmft_core import InputError, LlmftError, ReadFragment
from llmft_core.catalog import Catalog
from llmft_core.checkpoint.state import check_whole, key_of
from llmft_core.checkpoint.stored_state import newest_state, open_state, restore
from llmft_core.loading import load_plugins
from llmft_core.storage.places import Place, Places

AT = TOTAL // 2


def place_in(folder: Path) -> Place:
    return Places(Catalog(load_plugins()), None, {}).place(str(folder))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), VOCABULARY)


STRATEGIES, PRECISIONS = ("ddp", "zero-2", "zero-3"), ("fp32", "bf16")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """(strategy, precision) → (the run's folder, each rank's answers: straight through, and from the middle on)."""
    folder = tmp_path_factory.mktemp("trained")
    kinds = list(product(STRATEGIES, PRECISIONS))
    cases = [
        (one, precision, str(base), 2, str(folder / one / precision), at) for one, precision in kinds for at in (0, AT)
    ]
    ranks = on_ranks(2, train_on, cases)
    return {
        kind: (folder.joinpath(*kind), [answers[2 * number : 2 * number + 2] for answers in ranks])
        for number, kind in enumerate(kinds)
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_is_the_same_bit_for_bit(
    strategy: str, precision: str, trained: dict[tuple[str, str], Any]
) -> None:
    run, ranks = trained[strategy, precision]
    for straight, resumed in ranks:
        assert straight["fragments"].keys() == resumed["fragments"].keys() != set()
        for key, values in straight["fragments"].items():
            assert np.array_equal(values, resumed["fragments"][key]), key
        assert straight["counters"] == resumed["counters"] == {"optimizer_steps": TOTAL}
    straight, resumed = ranks[0]
    assert resumed["loss"] == straight["loss"][AT:]
    assert straight["states"] == ["state_00000"]
    manifest = json.loads((run / "state_00000" / "manifest.json").read_text())
    assert (run / "state_00000" / ".is_state").is_file()
    kinds = {key.split("/")[0] for held in manifest["fragments"].values() for key in held}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"}


@pytest.mark.slow  # of a state of zero-3 the same is shown by tests/core/test_offload.py, of all sizes by the next one
def test_another_strategy_and_world_size_go_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same data order and schedule; sums are rounded in another order."""
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    run = str(tmp_path / "run")
    (straight,) = on_ranks(2, train_on, [("zero-3", "fp32", str(base), 2, run, 0)])[0]
    two = on_ranks(2, train_on, [(strategy, "fp32", str(base), 2, run, AT) for strategy in ("zero-2", "ddp")])[0]
    one = on_ranks(1, train_on, [(strategy, "fp32", str(base), 1, run, AT) for strategy in ("ddp", "zero-2", "zero-3")])
    for resumed in (*two, *one[0]):
        assert resumed["loss"] == pytest.approx(straight["loss"][AT:], rel=1e-5)


AHEAD = 20


def test_another_world_size_or_strategy_goes_on_for_twenty_steps(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 → 1, 2 → 4 and 1 → 2 ranks under zero-3, and zero-2 → zero-3 → ddp."""
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    tolerances = {"fp32": 1e-5, "bf16": 1e-3}

    def losses(world_size: int, *runs: tuple[str, str, int]) -> list[list[float]]:
        """Of (strategy, folder of the states, step of the state to go on from), for both precisions."""
        cases = [  # a small rate: rounding grows with the steps
            (
                strategy,
                precision,
                str(base),
                world_size,
                str(tmp_path / run / precision),
                step,
                AT + AHEAD,
                AT,
                "full",
                1e-3,
            )
            for strategy, run, step in runs
            for precision in tolerances
        ]
        return [answer["loss"] for answer in on_ranks(world_size, train_on, cases)[0]]

    straight = losses(2, ("zero-3", "two", 0), ("zero-2", "chain", 0))
    alone = losses(1, ("zero-3", "one", 0), ("zero-3", "two", AT))
    pairs = [(straight[0:2], alone[2:4]), (straight[0:2], losses(4, ("zero-3", "two", AT)))]
    again = losses(2, ("zero-3", "one", AT), ("zero-3", "chain", AT), ("ddp", "chain", AT))
    pairs += [(alone[0:2], again[0:2]), (straight[2:4], again[2:4]), (straight[2:4], again[4:6])]
    for number, (before, after) in enumerate(pairs):
        for one, other, tolerance in zip(before, after, tolerances.values(), strict=True):
            assert len(other) == AHEAD
            assert other == pytest.approx(one[AT:], rel=tolerance), number


def complete_state(tmp_path: Path, base: Path) -> Path:
    on_ranks(1, train_on, [("ddp", "fp32", str(base), 1, str(tmp_path / "run"), 0)])
    return tmp_path / "run" / "state_00000"


def test_a_damaged_or_foreign_state_never_becomes_a_fresh_start(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    folder = complete_state(tmp_path, base)
    state = open_state(place_in(folder))
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())

    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(LlmftError, match=r"rank-00000-00000\.safetensors: \d+ bytes with SHA-256 .* were promised"):
        restore(state, Reading(["lm_head.weight"]), tmp_path / "other cache")  # type: ignore[arg-type]
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(LlmftError, match=r"holds 0 of the elements 0 to 4 of master of other\.weight"):
        restore(state, Reading(["other.weight"]), tmp_path / "cache")  # type: ignore[arg-type]

    (folder / "progress.json").write_text('{"step": 3, "counters": {"optimizer_steps": 3.0}}\n')
    with pytest.raises(LlmftError, match=r"progress\.json is not the one that the manifest describes"):
        open_state(place_in(folder))
    (folder / ".is_state").unlink()
    with pytest.raises(InputError, match="is not a complete state"):
        open_state(place_in(folder))
    assert newest_state(place_in(folder.parent)) is None


class Reading:
    """An engine that wants the first elements of some masters."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def restore(self, read: ReadFragment, counters: object) -> None:
        for name in self.names:
            read(name, "master", 0, torch.zeros(4))


def test_what_the_ranks_hold_must_be_the_whole() -> None:
    shapes = {"a": (2, 3)}
    whole = {"f": {key_of("a", kind, start): 3 for kind in ("master", "exp_avg") for start in (0, 3)}}
    check_whole(whole, shapes)
    for wrong in (
        {"f": {key_of("a", "master", 0): 3}},
        {"f": {key_of("a", "master", 0): 6, key_of("a", "exp_avg", 0): 3}},
        {"f": {key_of("a", "master", 0): 4, key_of("a", "master", 3): 3}},
    ):
        with pytest.raises(LlmftError, match="the ranks do not hold"):
            check_whole(wrong, shapes)
    with pytest.raises(LlmftError, match="of what is not trained"):
        check_whole({"f": {**whole["f"], key_of("b", "master", 0): 1}}, shapes)
