"""The family for everything else: sizes counted on a model without memory."""

from __future__ import annotations

from typing import Any

import pytest

from llmft_core import InputError, Options
from llmft_plugins.models.auto import Auto

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 128}
MISTRAL = {
    "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": False,
    "architectures": ["MistralForCausalLM"], "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def family() -> Auto:
    return Auto(Options())


def test_it_is_the_fallback_without_names(family: Auto) -> None:
    assert family.fallback
    assert family.names == ()
    assert family.claims({})
    assert family.claims({"model_type": "llama"})
    assert family.hub_id("x") is None


@pytest.mark.parametrize("config", [GPT2, MISTRAL, {**MISTRAL, "tie_word_embeddings": True}])
def test_size_is_that_of_the_instantiated_model(family: Auto, config: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    assert family.size(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_products_leave_out_tables_that_are_only_looked_up(family: Auto) -> None:
    layer = 64 * 64 * 2 + 2 * 64 * 16 + 3 * 64 * 96  # q and o, k and v, feed-forward
    assert family.size(MISTRAL).matmul_parameters == 2 * layer + 300 * 64
    assert family.size({**MISTRAL, "tie_word_embeddings": True}).matmul_parameters == 2 * layer + 300 * 64
    transformer = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256)  # GPT-2's layers
    assert family.size(GPT2).matmul_parameters == transformer + 300 * 64, "not the table of positions"


@pytest.mark.parametrize("config", [{"model_type": "no-such-thing"}, {"model_type": "vit"}, {}])
def test_what_transformers_cannot_build_is_named(family: Auto, config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"model_type .*choose another model"):
        family.size(config)
