"""Adapters, for every strategy: the same losses, exact resume, and a checkpoint that is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import AT, TOTAL, VOCABULARY, train_adapter
from ranks import on_ranks
from tables import tiny_llama
from toy_tokenizers import save_toy_tokenizer

STRATEGIES = ["ddp", "zero-2", "zero-3"]
OPTIONS = {"rank": 4, "dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("base"))
    (folder / "tokenizer").mkdir()
    save_toy_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Strategy → (the run's folder, each rank's answers: straight through, and from the middle on)."""
    found = {}
    for strategy in STRATEGIES:
        run = tmp_path_factory.mktemp(strategy)
        cases = [(strategy, "fp32", 2, str(base), str(run), OPTIONS, step) for step in (0, AT)]
        found[strategy] = (run, on_ranks(2, train_adapter, cases))
    return found


def test_all_strategies_train_the_same(trained: dict[str, Any]) -> None:
    _, ((first, _), _) = trained["ddp"]
    for strategy in STRATEGIES[1:]:
        _, ((other, _), _) = trained[strategy]
        np.testing.assert_allclose(other["loss"], first["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["norm"], first["norm"], rtol=1e-4)
        for name, values in first["began"].items():
            assert np.array_equal(other["began"][name], values), f"{strategy} begins {name} with other numbers"
    assert first["loss"][-1] < first["loss"][0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_is_the_same_bit_for_bit(strategy: str, trained: dict[str, Any]) -> None:
    run, ranks = trained[strategy]
    for straight, resumed in ranks:
        assert straight["fragments"].keys() == resumed["fragments"].keys() != set()
        for key, values in straight["fragments"].items():
            assert np.array_equal(values, resumed["fragments"][key]), key
        assert np.array_equal(straight["logits"], resumed["logits"])
    assert ranks[0][1]["loss"] == ranks[0][0]["loss"][AT:]
    manifest = json.loads((run / "state_00000" / "manifest.json").read_text())
    held = {key.split("/", 2)[2] for fragments in manifest["fragments"].values() for key in fragments}
    assert held == set(ranks[0][0]["began"]), "the frozen model is no part of the state"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_that_is_trained_moves_also_the_rows_of_special_tokens(strategy: str, trained: dict[str, Any]) -> None:
    _, ((straight, _), _) = trained[strategy]
    for name, values in straight["began"].items():
        assert not np.array_equal(values, straight["ended"][name]), name
    rows = {name: values for name, values in straight["ended"].items() if "token_adapter" in name}
    assert {name.split(".token_adapter")[0] for name in rows} == {"model.embed_tokens", "lm_head"}
    for name, values in rows.items():
        assert values.shape == (4, 32)
        assert (values != straight["began"][name]).any(axis=1).all(), "each row of them"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_peft_itself_loads_what_was_trained(strategy: str, trained: dict[str, Any], base: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    run, ((straight, _), _) = trained[strategy]
    folder = run / "checkpoint_00000"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", ".is_checkpoint"} <= names
    assert not {"config.json", "model.safetensors"} & names
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    assert all(name.startswith("base_model.model.") for name in shapes)
    assert all(0 not in shape for shape in shapes.values())
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    adapted = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        logits = adapted(torch.tensor([[1, 97, 5, 98, 99, 7, 100]])).logits.numpy()
    # Rows that nobody trained: our mean against transformers' own new numbers, nowhere in this vocabulary.
    np.testing.assert_allclose(logits, straight["logits"], rtol=1e-5, atol=1e-5)


def test_the_manifest_says_what_was_trained(trained: dict[str, Any]) -> None:
    run, ((straight, _), _) = trained["zero-3"]
    manifest = json.loads((run / "checkpoint_00000" / "manifest.json").read_text())
    assert manifest["tensors"]["trained"] == manifest["tensors"]["changed"] == len(straight["began"])
    assert manifest["step"] == TOTAL
    assert "adapter_model.safetensors" in manifest["files"]


def test_in_bf16_nothing_but_the_adapter_is_fp32(base: Path, tmp_path: Path) -> None:
    """DDP holds what it trains in fp32; of a frozen weight it needs no second copy."""
    cases = [(strategy, "bf16", 2, str(base), str(tmp_path / strategy), OPTIONS, 0) for strategy in STRATEGIES]
    answers = on_ranks(2, train_adapter, cases)[0]
    for answer in answers:
        assert answer["frozen_types"] == {"torch.bfloat16"}
        assert answer["loss"][-1] < answer["loss"][0]
        np.testing.assert_allclose(answer["loss"], answers[0]["loss"], rtol=1e-2)
