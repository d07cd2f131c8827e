"""The loop over every engine: one loss, however the global batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import on_ranks
from tables import tiny_llama
from training import train_rank, train_with_each

STRATEGIES = ("ddp", "zero-2", "zero-3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def reference(model: str) -> Any:
    """One process, one big batch, no DeepSpeed."""
    return on_ranks(1, train_rank, "ddp", model, [(1, 8, 1)], {})[0][0]


@pytest.fixture(scope="module")
def others(model: str) -> list[dict[str, Any]]:
    """By strategy, of a rank alone and of the first of two."""
    cuts = ((1, [(1, 2, 4)]), (2, [(2, 2, 2)]))
    return [on_ranks(ranks, train_with_each, STRATEGIES, model, layouts, {})[0] for ranks, layouts in cuts]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_cut_of_the_global_batch_gives_the_same_curve(
    strategy: str, reference: Any, others: list[dict[str, Any]]
) -> None:
    alone, together = (found[strategy] for found in others)
    for other in (*alone, *together):
        assert other["loss"] == pytest.approx(reference["loss"], abs=2e-5)
        assert other["norm"] == pytest.approx(reference["norm"], rel=1e-4)
        assert other["eval"] == pytest.approx(reference["eval"], abs=2e-5)
        assert other["shapes"] == reference["shapes"]
        for name, weight in reference["weights"].items():
            assert other["weights"][name] == pytest.approx(weight, abs=2e-4), name
    assert len(reference["eval"]) == 3  # two epochs and the last step
