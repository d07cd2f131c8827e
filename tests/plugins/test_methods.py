"""The methods that ship: what they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tables import tiny_llama

from llmft_core import InputError, Options, Placement, Setting
from llmft_core.prepare import special_ids_of
from llmft_plugins.methods.full import Full
from llmft_plugins.methods.lora import Lora, LoraOptions

CPU = Placement(1, "cpu", "fp32", 2, 1, 1.0)
GPU = Placement(1, "cuda", "bf16", 2, 1, 1.0)
LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def setting(placement: Placement = CPU, *, partitioned: bool = False, special_ids: tuple[int, ...] = ()) -> Setting:
    return Setting(placement, partitioned, special_ids, seed=0, base="owner/model")


def lora(**options: Any) -> Lora:
    return Lora(LoraOptions.model_validate(options))


def model_in(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama(folder, **settings))


def trained_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_full_trains_everything_also_what_arrives_frozen() -> None:
    from torch import nn

    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).requires_grad_(False)
    trained = Full(Options()).apply(model, setting())
    assert trained is model
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_lora_adapts_all_linear_layers_but_the_output(tmp_path: Path) -> None:
    method = lora(rank=4)
    model = method.apply(model_in(tmp_path), setting())
    names = trained_names(model)
    assert {name.split(".")[-4] for name in names} == set(LAYERS)
    assert len(names) == 2 * 7 * 2  # layers × projections × matrices
    assert method.adapter(model, setting()).config["target_modules"] == LAYERS
    assert method.adapter(model, setting()).config["lora_alpha"] == 8
    assert method.adapter(model, setting()).config["base_model_name_or_path"] == "owner/model"


def test_lora_adapts_what_it_is_told(tmp_path: Path) -> None:
    options = {"rank": 2, "target-modules": "q_proj,layers.1.mlp.down_proj"}
    names = trained_names(lora(**options).apply(model_in(tmp_path), setting()))
    layers = {name.partition(".lora_")[0] for name in names}
    assert layers == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    }


def test_layers_of_other_architectures_are_found() -> None:
    """GPT-2's are `Conv1D`s."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    names = trained_names(lora(rank=2).apply(model, setting(special_ids=(59,))))
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in names if "lora_" in name} == {
        "c_attn",
        "c_fc",
        "c_proj",
    }
    assert [name for name in names if "lora_" not in name] == [
        "transformer.wte.token_adapter.trainable_tokens_delta.default"
    ], "the output layer is the same weight"


@pytest.mark.parametrize("wrong", ["q_prj", "lm_head", "embed_tokens", "proj", "self_attn"])
def test_a_layer_that_is_not_there_is_refused_with_what_there_is(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        lora(**{"target-modules": f"v_proj,{wrong}"}).apply(model_in(tmp_path), setting())
    assert str(caught.value) == (
        f"method.target-modules: no linear layer of LlamaForCausalLM is called {wrong}; there are {', '.join(LAYERS)}"
    )


@pytest.mark.parametrize("tied", [False, True])
def test_special_tokens_are_trained_in_both_embeddings(tied: bool, tmp_path: Path) -> None:
    """Their gradient reaches the input's and the output's rows, and nothing else of the embeddings."""
    import torch

    model = model_in(tmp_path, tie_word_embeddings=tied)
    before = model(torch.tensor([[1, 95, 5]])).logits.detach()
    model = lora(rank=2).apply(model, setting(special_ids=(95, 96)))
    rows = [name for name in trained_names(model) if "lora_" not in name]
    assert len(rows) == (1 if tied else 2)
    after = model.eval()(torch.tensor([[1, 95, 5]])).logits
    assert torch.equal(before, after), "an adapter begins as nothing"
    after[..., 95].sum().backward()
    for name in rows:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.shape == (2, 32)
        assert gradient[0].abs().sum() > 0


def test_four_bits_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    method = lora(quantize="nf4")
    on_cpu = [str(problem) for problem in method.problems(setting())]
    assert on_cpu == [
        "method.quantize: 4-bit weights need an NVIDIA GPU: leave out --method.quantize, or train on GPUs"
    ]
    assert method.problems(setting(GPU)) == []
    (partitioned,) = method.problems(setting(GPU, partitioned=True))
    assert "use --strategy ddp or zero-2" in partitioned.reason
    assert lora().problems(setting()) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (lacking,) = method.node_problems("cuda")
    assert str(lacking) == "method.quantize: 4-bit weights need bitsandbytes: pip install 'llmft[qlora]' here"
    assert method.node_problems("cpu") == lora().node_problems("cuda") == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert method.node_problems("cuda") == []


def test_frozen_weights_are_loaded_in_the_type_of_the_arithmetic() -> None:
    import torch

    assert lora().loading(setting(GPU)) == {"dtype": torch.bfloat16}
    assert lora().loading(setting()) == {"dtype": torch.float32}
    assert Full(Options()).loading(setting(GPU)) == {}


@pytest.mark.parametrize("tied", [False, True])
def test_merged_it_is_a_plain_model_with_the_same_logits(tied: bool, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    method, ids = lora(rank=2), torch.tensor([[1, 95, 5, 96]])
    base = model_in(tmp_path / "base", tie_word_embeddings=tied)
    names = [name for name, _ in base.named_parameters()]
    model = method.apply(model_in(tmp_path / "base", tie_word_embeddings=tied), setting(special_ids=(95, 96)))
    adapter = method.adapter(model, setting())
    with torch.no_grad():
        for name in adapter.tensors:
            model.get_parameter(name).add_(0.1 * torch.randn_like(model.get_parameter(name)))
        logits = model.eval()(ids).logits
    tensors = {name: model.get_parameter(parameter).detach() for parameter, name in adapter.tensors.items()}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter.config))
    merged = method.merge(base, tmp_path / "adapter")
    assert [name for name, _ in merged.named_parameters()] == names
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model_in(tmp_path / "base", tie_word_embeddings=tied)(ids).logits, logits, atol=1e-2)


def test_recomputed_activations_give_the_same_gradients(tmp_path: Path) -> None:
    """Nothing that enters a frozen layer wants a gradient, where no token is trained; the adapters in it do."""
    import torch

    from llmft_core.train.model import recompute

    gradients = []
    for again in (False, True):
        model = model_in(tmp_path)
        if again:
            recompute(model)
        model = lora(rank=2, dropout=0.1).apply(model, setting()).train()
        torch.manual_seed(0)
        model(torch.tensor([[1, 95, 5]]), use_cache=False).logits.sum().backward()
        gradients.append({name: model.get_parameter(name).grad for name in trained_names(model)})
    plain, recomputed = gradients
    assert any(gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_special_ids_are_those_of_the_dataset_and_all_without_a_row() -> None:
    from toy_tokenizers import TAGS, metaspace_tokenizer

    tokenizer = metaspace_tokenizer()
    tags = tuple(tokenizer.convert_tokens_to_ids(tag) for tag in TAGS)
    assert special_ids_of(tokenizer, ["</s>", *TAGS], {"vocab_size": len(tokenizer) + 7}) == tags
    assert special_ids_of(tokenizer, [], {"vocab_size": len(tokenizer) - 1}) == (len(tokenizer) - 1,)
    assert special_ids_of(tokenizer, ["</s>"], {}) == ()
