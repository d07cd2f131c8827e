"""The loss: at trained positions, in chunks, and equal to that of all logits, whatever a model does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import on_ranks
from tables import tiny_llama
from training import gradients_of_both_ways

VOCABULARY = 101
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "capped": ("gemma2", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    "divided": ("granite", {"logits_scaling": 8.0}),
    "multiplied": ("cohere", {"logit_scale": 0.25}),
    "biased": ("phi", {}),
}


def model_of(kind: str) -> Any:
    """A small model of an architecture, with random weights large enough that its logits differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    name, settings = KINDS[kind]
    config = AutoConfig.for_model(name, **{**SIZES, "pad_token_id": 0, "initializer_range": 0.1, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


def rows_of(trained: float = 0.5) -> tuple[Any, Any]:
    """`input_ids` and `labels` (3, 30), each row trained elsewhere."""
    import torch

    random = np.random.default_rng(0)
    ids = random.integers(3, VOCABULARY, (3, 30))
    labels = np.where(random.random((3, 30)) < trained, ids, -100)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def loss_and_gradients(model: Any, loss: Any) -> tuple[float, dict[str, Any]]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def plain_loss(model: Any, ids: Any, labels: Any) -> Any:
    """With all logits, as in a textbook."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def ours(model: Any, ids: Any, labels: Any, way: str) -> Any:
    from llmft_core.train.loss import loss_sum
    from llmft_core.train.output_layer import OutputLayer

    output = OutputLayer(model)
    output.way = way  # type: ignore[assignment]
    return loss_sum(model, ids, labels, None, output)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Positions in a chunk: 7, so that the last one is not full."""
    from llmft_core.train import chunked_loss

    monkeypatch.setitem(chunked_loss.CHUNK_BYTES, "cpu", 7 * 4 * VOCABULARY)
    return 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["loss", "positions"])
def test_loss_and_gradients_are_those_of_all_logits(kind: str, way: str, small_chunks: int) -> None:
    model, (ids, labels) = model_of(kind), rows_of()
    expected_loss, expected = loss_and_gradients(model, plain_loss(model, ids, labels))
    loss, gradients = loss_and_gradients(model, ours(model, ids, labels, way))
    assert loss == pytest.approx(expected_loss, rel=2e-6)
    for name, gradient in expected.items():
        difference = float((gradients[name] - gradient).abs().max())
        assert difference <= 1e-5 * float(gradient.abs().max()), name


@pytest.mark.parametrize("way", ["loss", "positions"])
def test_in_bf16_the_weights_gradient_is_as_exact_as_that_of_all_logits(way: str, small_chunks: int) -> None:
    import torch

    model, (ids, labels) = model_of("llama"), rows_of()
    _, exact = loss_and_gradients(model, plain_loss(model, ids, labels))
    with torch.autocast("cpu", torch.bfloat16):
        plain, their = loss_and_gradients(model, plain_loss(model, ids, labels))
        loss, gradients = loss_and_gradients(model, ours(model, ids, labels, way))
    assert loss == pytest.approx(plain, rel=1e-3)
    off = float((gradients["lm_head.weight"] - exact["lm_head.weight"]).norm())
    assert 0 < off <= 1.2 * float((their["lm_head.weight"] - exact["lm_head.weight"]).norm())


@pytest.mark.parametrize("autocast", [False, True])
def test_in_fp16_gradients_under_a_loss_scale_are_as_exact_as_those_of_all_logits(
    autocast: bool, small_chunks: int
) -> None:
    import torch

    model, (ids, labels) = model_of("llama"), rows_of()
    _, exact = loss_and_gradients(model, plain_loss(model, ids, labels))
    model = model if autocast else model.half()
    scale = 2.0**6
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        plain, their = loss_and_gradients(model, plain_loss(model, ids, labels) * scale)
        loss, gradients = loss_and_gradients(model, ours(model, ids, labels, "loss") * scale)
    assert loss == pytest.approx(plain, rel=1e-3)
    for name, gradient in exact.items():
        off = float((gradients[name].float() / scale - gradient).norm())
        assert off <= 1.2 * float((their[name].float() / scale - gradient).norm()), name


def test_in_fp16_gradients_are_scaled_before_they_are_rounded() -> None:
    """Of a model that is certain and right they are too small for fp16 until then."""
    import torch

    from llmft_core.train.chunked_loss import Shaping, chunked_loss

    hidden, weight = (18 * torch.eye(8)).half().requires_grad_(), torch.eye(8).half().requires_grad_()
    numbers = torch.arange(8)
    (chunked_loss(hidden, weight, None, numbers, numbers, Shaping()) * 2.0**16).backward()
    exact = torch.softmax(18 * torch.eye(8, dtype=torch.float64), dim=1) - torch.eye(8)
    assert float(exact.abs().max()) < 2.0**-22
    assert not exact.fill_diagonal_(0).half().any()
    for gradient, expected in ((hidden.grad, exact), (weight.grad, 18 * exact)):
        apart = ~torch.eye(8, dtype=torch.bool)
        assert gradient[apart].double().numpy() == pytest.approx((expected * 2.0**16)[apart].numpy(), rel=1e-3)


def test_in_fp16_a_scale_that_is_too_large_leaves_no_finite_gradient(small_chunks: int) -> None:
    """So the loss scaler sees it, and lowers the scale."""
    import torch

    model, (ids, labels) = model_of("llama").half(), rows_of()
    loss, gradients = loss_and_gradients(model, ours(model, ids, labels, "loss") * 2.0**20)
    assert np.isfinite(loss)
    assert not torch.isfinite(gradients["lm_head.weight"]).all()
    _, gradients = loss_and_gradients(model, ours(model, ids, labels, "loss") * 2.0**6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_where_nothing_is_trained_the_loss_is_0_and_every_parameter_has_a_gradient_of_0() -> None:
    model, (ids, labels) = model_of("llama"), rows_of(trained=0)
    loss, gradients = loss_and_gradients(model, ours(model, ids, labels, "loss"))
    assert loss == 0
    assert {name for name, gradient in gradients.items() if not gradient.any()} == set(gradients)


def test_a_frozen_output_layer_gets_no_gradient_and_the_rest_the_same() -> None:
    model, (ids, labels) = model_of("llama"), rows_of()
    _, expected = loss_and_gradients(model, plain_loss(model, ids, labels))
    model.lm_head.weight.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    ours(model, ids, labels, "loss").backward()
    assert model.lm_head.weight.grad is None
    embedding = model.model.embed_tokens.weight.grad
    assert float((embedding - expected["model.embed_tokens.weight"]).abs().max()) <= 1e-5 * float(embedding.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_logits_are_made_but_those_of_a_chunk(dtype: str, small_chunks: int) -> None:
    """Counted in every operation of the forward and the backward pass."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Rows(TorchDispatchMode):
        """The most rows of a tensor that is as wide as the vocabulary."""

        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                shape = getattr(tensor, "shape", ())
                if len(shape) >= 2 and shape[-1] == VOCABULARY and tensor.is_contiguous():
                    self.most = max(self.most, tensor.numel() // VOCABULARY)
            return made

    model, (ids, labels) = model_of("llama").to(getattr(torch, dtype)), rows_of()
    with Rows() as chunked:
        ours(model, ids, labels, "loss").backward()
    with Rows() as whole:
        plain_loss(model, ids, labels).backward()
    assert chunked.most == small_chunks
    assert whole.most == 3 * 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for kind in ("tied", "capped"):
        model_of(kind).save_pretrained(root / kind)
    tiny_llama(root / "llama", VOCABULARY)
    return {kind: str(root / kind) for kind in ("llama", "tied", "capped")}


@pytest.mark.parametrize("strategy", ["ddp", "zero-2", "zero-3"])
def test_two_ranks_of_which_one_trains_nothing(strategy: str, folders: dict[str, str]) -> None:
    for answer in on_ranks(2, gradients_of_both_ways, strategy, folders):
        for kind, found in answer.items():
            assert (found["way"], found["said"]) == ("loss", ""), kind
            loss, expected = found["loss"]
            assert loss == pytest.approx(expected, rel=2e-6), kind
            assert len(found["gradients"]) > 10
            for name, (gradient, reference) in found["gradients"].items():
                assert np.abs(gradient - reference).max() <= 1e-5 * np.abs(reference).max(), (kind, name)


def test_an_unknown_cap_or_another_kind_of_layer_is_noticed(tmp_path: Path) -> None:
    from training import ways_of_strange_models

    (found,) = on_ranks(1, ways_of_strange_models, str(tiny_llama(tmp_path / "llama", VOCABULARY)))
    at_once = "LlamaForCausalLM: all logits of a micro-batch are in memory at once, for its output layer is unusual"
    padding = "LlamaForCausalLM: logits are computed of prompts and padding too, for its output layer is unusual"
    assert found == {
        "llama": ("loss", ""),
        "capped by tanh at 1000": ("positions", at_once),
        "another kind": ("positions", at_once),
        "only every other entry": ("all", padding),
        "no layer": ("all", padding),
        "fp16": ("loss", ""),
    }
