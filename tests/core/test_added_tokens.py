"""Rows for added tokens: the mean of the old ones, the same bytes under every strategy and on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import on_ranks
from tables import tiny_llama
from transformers import AutoModelForCausalLM
from widening import widen

OLD, NEW = 97, 103  # neither divides by 2 or 4: partitions end in the middle of rows
OFFLOADED = {
    "name": "zero-3",
    "offload": "all",
    "config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}
STRATEGIES = ("ddp", "zero-2", "zero-3", OFFLOADED)
CASES = [("untied", NEW), ("tied", NEW), ("untied", OLD - 5), ("tied", OLD - 5)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_llama(root / name, OLD, tie_word_embeddings=name == "tied") for name in ("untied", "tied")}


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_new_rows_are_the_mean_of_the_old_ones_everywhere(world_size: int, folders: dict[str, Path]) -> None:
    cases: list[Any] = [(strategy, str(folders[name]), size) for strategy in STRATEGIES for name, size in CASES]
    ranks = on_ranks(world_size, widen, world_size, cases)
    for number, (_, folder, size) in enumerate(cases):
        reference = AutoModelForCausalLM.from_pretrained(folder)
        old = {
            name: tensor.detach().numpy()
            for name, tensor in reference.named_parameters()
            if "embed_tokens" in name or "lm_head" in name
        }
        tied = folder.endswith("/tied")
        rows = max(OLD, size)  # a model with more rows than the tokenizer has entries keeps them
        for answer in (rank[number] for rank in ranks):
            assert answer["tied"] is tied
            assert answer["entries"] == rows
            assert answer["shapes"] == dict.fromkeys(old, (rows, 32))
        values = ranks[0][number]["values"]
        assert len(values) == (1 if tied else 2)
        for name, tensor in old.items():
            assert np.array_equal(values[name][:OLD], tensor)
            mean = reference.get_parameter(name).mean(dim=0).detach().numpy()
            assert np.array_equal(values[name][OLD:], np.broadcast_to(mean, (rows - OLD, 32)))
