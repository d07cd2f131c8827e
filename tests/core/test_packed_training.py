"""Training on packed rows: each sample's loss and gradient are what they are alone, and no sample sees another."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import on_ranks
from tables import ListTable, random_table, tiny_llama
from training import isolation, train_rank, train_with_each

from llmft_core.data.batches import Form, MicroBatch, collate
from llmft_core.data.order import Order, Rows

VOCABULARY, CONTEXT = 97, 40
PACKED = {"context-length": 20, "data": {"packing": "best-fit"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), VOCABULARY)


def gpt2() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT)
    ).eval()


def llama(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).eval()


def loss_and_gradients(model: Any, batches: list[MicroBatch], flat: bool) -> tuple[float, dict[str, Any]]:
    import torch

    from llmft_core.train.joined_rows import takes_lengths
    from llmft_core.train.loss import Call, micro_batch_loss
    from llmft_core.train.output_layer import OutputLayer

    model.zero_grad()
    output = OutputLayer(model)
    output.way = "loss"
    call = Call(output, flat, takes_lengths(model))
    loss = sum(micro_batch_loss(model, batch, torch.device("cpu"), call) for batch in batches)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_and_alone(table: ListTable) -> tuple[MicroBatch, list[MicroBatch]]:
    """All samples in one micro-batch of packed rows, and each in a micro-batch of its own."""
    epoch = Order(table.lengths, 0, CONTEXT).epoch(0)
    filled = epoch.step(0, len(epoch) + 1)  # one row is nothing but padding
    packed = collate(table, filled, np.arange(len(filled)), 0, Form(0, packed=True))
    unpacked = Order(table.lengths, 0, capacity=0).epoch(0)
    alone = [collate(table, unpacked, np.array([number]), 0, Form(0, packed=False)) for number in range(len(table))]
    return packed, alone


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_packed_loss_and_gradients_are_the_sum_of_those_of_each_sample(kind: str, flat: bool, folder: Path) -> None:
    model = llama(folder) if kind == "llama" else gpt2()
    packed, alone = packed_and_alone(random_table(12, VOCABULARY, 19))
    assert len(packed.input_ids) < 8
    loss, gradients = loss_and_gradients(model, [packed], flat)
    expected_loss, expected = loss_and_gradients(model, alone, flat=False)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (gradients[name] - gradient).abs().max()
        assert float(difference) <= 1e-5 * float(gradient.abs().max()), name


def varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Any:
    """flash-attn's `flash_attn_varlen_func` by PyTorch: each sample's attention alone. q is (T, heads, head size)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    assert causal
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert isinstance(max_seqlen_q, int), "of a tensor, flash-attn would have to wait for the GPU"
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    samples = []
    for begin, end in pairwise(cu_seqlens_q.tolist()):
        one = [values[begin:end].transpose(0, 1) for values in (q, k, v)]
        samples.append(scaled_dot_product_attention(*one, is_causal=True, scale=softmax_scale, enable_gqa=True))
    return torch.cat(samples, dim=1).transpose(0, 1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_flash_attention_is_told_where_samples_begin(
    checkpointing: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own way to FlashAttention, with only the kernel replaced: no layer looks at the positions."""
    import transformers.modeling_flash_attention_utils as flash

    from llmft_core.train.joined_rows import joins_rows
    from llmft_core.train.model import recompute

    def looks(*_: Any) -> bool:
        raise AssertionError("a layer reads the positions back")

    monkeypatch.setattr(flash, "_is_packed_sequence", looks)
    for name, function in {
        "_flash_varlen_fn": varlen,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(varlen),
        "_loaded_implementation": "flash_attention_2",
    }.items():
        monkeypatch.setattr(flash, name, function, raising=False)
    packed, alone = packed_and_alone(random_table(12, VOCABULARY, 19))
    expected_loss, expected = loss_and_gradients(llama(folder), alone, flat=False)
    model = llama(folder)
    model.config._attn_implementation = "flash_attention_2"
    if checkpointing:
        recompute(model)
        model.train()
    assert joins_rows(model)
    loss, gradients = loss_and_gradients(model, [packed], flat=True)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        difference = (gradients[name] - gradient).abs().max()
        assert float(difference) <= 1e-5 * float(gradient.abs().max()), name


def test_the_lengths_of_a_joined_row_are_those_of_its_samples_and_paddings() -> None:
    import torch

    from llmft_core.train.joined_rows import lengths

    for samples in ([3, 1, 1, 4], [1], [1, 1], [5]):
        positions = torch.cat([torch.arange(length) for length in samples]).view(1, -1)
        told = lengths(positions)
        bounds = np.cumsum([0, *samples]).tolist()
        assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == bounds  # type: ignore[union-attr]
        assert told["max_length_q"] == told["max_length_k"] == max(samples)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_first_sample_changes_nothing_for_the_next_one(kind: str, folder: Path) -> None:
    import torch

    model = llama(folder) if kind == "llama" else gpt2()
    random = np.random.default_rng(0)
    first, other, second = (random.integers(3, VOCABULARY, 15).tolist() for _ in range(3))
    logits = []
    for before in (first, other):
        table = ListTable([(before, before), (second, second)])
        row = Rows(np.array([0, 1], dtype=np.int32), np.array([0, 2], dtype=np.int32))
        batch = collate(table, row, np.array([0]), 0, Form(0, packed=True))
        inputs = {"input_ids": torch.from_numpy(batch.input_ids), "position_ids": torch.from_numpy(batch.position_ids)}
        with torch.no_grad():
            logits.append(model(**inputs, use_cache=False).logits)
    assert torch.equal(logits[0][:, 15:], logits[1][:, 15:])
    assert not torch.allclose(logits[0][:, :15], logits[1][:, :15], atol=1e-2)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return on_ranks(1, train_rank, "ddp", str(folder), [(1, 4, 1)], dict(PACKED))[0][0]


def test_packed_rows_give_the_same_curve_on_any_number_of_ranks(folder: Path, reference: Any) -> None:
    strategies = ("ddp", "zero-3")
    alone = on_ranks(1, train_with_each, strategies, str(folder), [(1, 2, 2)], dict(PACKED))[0]
    together = on_ranks(2, train_with_each, strategies, str(folder), [(2, 1, 2)], dict(PACKED))[0]
    for other in (one for found in (alone, together) for strategy in strategies for one in found[strategy]):
        assert other["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert other["eval"] == pytest.approx(reference["eval"], rel=1e-5)
    assert len(set(reference["loss"])) == 5


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 1), ("zero-3", 2)])
def test_models_that_let_samples_see_each_other_are_refused_on_every_rank(
    strategy: str, ranks: int, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "num_hidden_layers": 2, "n_head": 4}
    for kind in ("bloom", "mamba"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        model.save_pretrained(tmp_path / kind)
    gpt2().save_pretrained(tmp_path / "gpt2")
    tiny_llama(tmp_path / "llama", VOCABULARY)
    kinds = ("llama", "gpt2", "bloom", "mamba")
    answers = on_ranks(ranks, isolation, strategy, {kind: str(tmp_path / kind) for kind in kinds})
    assert answers == [answers[0]] * ranks
    assert answers[0]["llama"] == answers[0]["gpt2"] == ""
    for kind, name in (("bloom", "BloomForCausalLM"), ("mamba", "MambaForCausalLM")):
        assert answers[0][kind].startswith(f"{name} lets packed samples see each other (what lies before a sample")
        assert answers[0][kind].endswith("%): use --data.packing none")
