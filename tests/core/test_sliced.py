"""Loading under ZeRO-3: every rank reads its own share, and together they hold what transformers would load."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import WHOLE, load_on_rank
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from tables import tiny_llama
from transformers import AutoModelForCausalLM, GenerationConfig, Glm4MoeConfig, GPT2Config, GPT2Model, MixtralConfig

from llmft_core.errors import LlmftError, one_line
from llmft_core.train.tensor_map import map_tensors
from llmft_core.weights.tensors import CHUNK, TensorFiles

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 56, "max_position_embeddings": 128}


def rewrite(folder: Path, change: Any) -> Path:
    """Change the tensors of a folder's only file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()  # its pages may still be mapped
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gpt2_without_prefix(folder: Path) -> Path:
    """Names without `transformer.`, and a mask that old files hold: as the files on the hub are."""
    torch.manual_seed(2)
    GPT2Model(GPT2Config(vocab_size=97, n_positions=64, n_embd=30, n_layer=2, n_head=3)).save_pretrained(folder)
    return rewrite(folder, lambda tensors: tensors.update({"h.0.attn.bias": torch.ones(1, 1, 64, 64)}))


def experts(folder: Path, *, fused: bool) -> Path:
    """A mixture of experts; `fused` as it is trained, with a buffer that is part of the weights."""
    torch.manual_seed(3)
    if not fused:
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2))
        model.save_pretrained(folder)
        return folder
    settings = {"n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    settings |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(Glm4MoeConfig(**SMALL, **settings))
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([5.003, 5.001, 5.002]))
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    single = tiny_llama(root / "single")
    sharded = root / "sharded"
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    GenerationConfig(eos_token_id=[5, 7], temperature=0.3, do_sample=True).save_pretrained(single)
    tied = tiny_llama(root / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    twice = tiny_llama(root / "tied-twice", tie_word_embeddings=True)
    rewrite(twice, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    apart = tiny_llama(root / "tied-in-config-only", tie_word_embeddings=True)
    rewrite(apart, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    named = {path.name: path for path in (single, sharded, tied, twice, apart)}
    return named | {
        "gpt2": gpt2_without_prefix(root / "gpt2"),
        "fused": experts(root / "fused", fused=True),
        "unfused": experts(root / "unfused", fused=False),
    }


CASES = [
    ("single", "fp32", WHOLE),
    ("single", "bf16", WHOLE),
    ("single", "bf16", 101),
    ("sharded", "fp32", WHOLE),
    ("sharded", "bf16", WHOLE),
    ("tied", "fp32", WHOLE),
    ("tied", "fp32", 101),
    ("tied-twice", "fp32", WHOLE),
    ("tied-in-config-only", "fp32", WHOLE),
    ("gpt2", "fp32", WHOLE),
    ("fused", "bf16", WHOLE),
    ("unfused", "fp32", WHOLE),
]


@pytest.fixture(scope="module", params=[2, 3])
def loaded(request: pytest.FixtureRequest, folders: dict[str, Path]) -> dict[tuple[str, str, int], list[Any]]:
    """What each rank says of each case; 3 ranks, because then every parameter is padded."""
    cases = [(str(folders[name]), precision, vocabulary) for name, precision, vocabulary in CASES]
    said = on_ranks(request.param, load_on_rank, request.param, cases)
    answers = [torch.load(io.BytesIO(one), weights_only=False) for one in said]
    return {case: [answer[number] for answer in answers] for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_model_is_what_transformers_loads(case: Any, loaded: Any, folders: dict[str, Path]) -> None:
    name, precision, vocabulary = case
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    reference = AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype)
    first, *others = loaded[case]
    expected = dict(reference.named_parameters())
    assert first["weights"].keys() == expected.keys()  # so what is tied there is tied here
    assert ("lm_head.weight" in expected) == (name not in ("tied", "tied-twice", "gpt2"))
    for key, tensor in expected.items():
        found = first["weights"][key]
        assert found.dtype == dtype
        if vocabulary and ("embed_tokens" in key or "lm_head" in key):
            assert len(found) == vocabulary
            assert torch.allclose(found[97:].float(), tensor.float().mean(dim=0), atol=1e-3)
            found = found[:97]
        assert torch.equal(found, tensor), key
    for answer in (first, *others):
        assert answer["buffers"].keys() == dict(reference.named_buffers()).keys()
        for key, buffer in reference.named_buffers():
            assert answer["buffers"][key].dtype == buffer.dtype
            assert torch.equal(answer["buffers"][key], buffer), key
        assert answer["generation"] == reference.generation_config.to_dict()


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[0] != "unfused"], ids=lambda case: "-".join(map(str, case))
)
def test_the_ranks_share_the_reading(case: Any, loaded: Any, folders: dict[str, Path]) -> None:
    with_values = load_layout(folders[case[0]])
    total = sum(with_values.values())
    twice = sum(size for name, size in with_values.items() if "e_score" in name)  # a buffer is whole on every rank
    if case[0].startswith("tied-"):
        twice = 2 * with_values["model.embed_tokens.weight"]  # two tensors are compared before anything is read
    answers = loaded[case]
    counts = [answer["read"] for answer in answers]
    if case[0] == "tied-twice":
        total -= with_values["lm_head.weight"]
    assert total <= sum(counts) <= total + len(answers) * twice
    assert max(counts) <= (total + len(answers) * twice) / len(answers) + 4 * len(with_values)
    for answer in answers:
        assert answer["warnings"] == []
        assert not any(value for part in answer["padding"] for value in part)


def load_layout(folder: Path) -> dict[str, int]:
    """Bytes of every tensor that the model takes from its files."""
    files = TensorFiles(folder)
    sources = map_tensors(folder, files, torch.float32).sources
    return {target: load_sizes(files, source) for target, source in sources.items()}


def load_sizes(files: TensorFiles, name: str) -> int:
    stored = files.tensors[name]
    return torch.Size(stored.shape).numel() * {"F32": 4, "BF16": 2}[stored.dtype]


def test_a_model_that_transformers_converts_is_loaded_whole_and_that_is_said(loaded: Any) -> None:
    for answer in loaded["unfused", "fp32", WHOLE]:
        (warning,) = answer["warnings"]
        assert "rank 0 reads the whole model into its memory: transformers converts" in warning
        assert answer["read"] == 0


def broken(tmp_path: Path, **settings: Any) -> Path:
    return tiny_llama(tmp_path / "model", **settings)


def problem_of(folder: Path) -> str:
    """What is said of a model folder, in one line."""
    with pytest.raises(LlmftError) as caught:
        map_tensors(folder, TensorFiles(folder), torch.float32)
    assert "\n" not in str(caught.value)
    return one_line(caught.value)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = rewrite(broken(tmp_path), lambda tensors: tensors.pop("model.norm.weight"))
    assert "(missing keys: model.norm.weight): check the model folder" in problem_of(folder)


def test_a_tied_weight_that_is_nowhere_is_missing(tmp_path: Path) -> None:
    folder = rewrite(broken(tmp_path, tie_word_embeddings=True), lambda t: t.pop("model.embed_tokens.weight"))
    assert "missing keys: lm_head.weight, model.embed_tokens.weight" in problem_of(folder)


def test_a_tensor_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    folder = rewrite(broken(tmp_path), lambda tensors: tensors.update({"score.weight": torch.ones(2, 32)}))
    assert "(unexpected keys: score.weight)" in problem_of(folder)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = rewrite(broken(tmp_path), lambda tensors: tensors.update({"model.norm.weight": torch.ones(33)}))
    assert "(mismatched keys: model.norm.weight [33] instead of [32])" in problem_of(folder)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"{path}: is no whole safetensors file" in problem_of(folder)


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    path = folder / "model.safetensors"
    with TensorFiles(folder) as files:
        last = max(files.tensors, key=lambda name: files.tensors[name].offset)
        path.write_bytes(path.read_bytes()[:-8])
        count = torch.Size(files.tensors[last].shape).numel()
        with pytest.raises(LlmftError, match="ends 8 bytes too early"):
            files.read(last, 0, torch.empty(count))


def test_a_file_that_is_not_what_the_index_says_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["sharded"], folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["model.norm.weight"]
    other = next(name for name in content["weight_map"].values() if name != file)
    content["weight_map"]["model.norm.weight"] = other
    index.write_text(json.dumps(content))
    assert "not the file that model.safetensors.index.json lists (model.norm.weight)" in problem_of(folder)
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    assert "a file outside of the folder" in problem_of(folder)
    index.write_text("[]")
    assert f"{index}: is no index of weights" in problem_of(folder)
    index.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in problem_of(folder)


def test_any_range_is_read_in_any_type(tmp_path: Path) -> None:
    count = CHUNK // 2 + 3  # more than one chunk of bf16
    values = torch.arange(count).remainder(200).to(torch.bfloat16)
    save_file({"a": torch.ones(3), "x": values.view(1, -1)}, tmp_path / "model.safetensors")
    with TensorFiles(tmp_path) as files:
        for dtype in (torch.bfloat16, torch.float32):
            into = torch.zeros(count - 5, dtype=dtype)
            files.read("x", 2, into)
            assert torch.equal(into, values[2:-3].to(dtype))
        assert files.bytes_read == 2 * 2 * (count - 5)
        with pytest.raises(IndexError):
            files.read("x", count - 1, torch.empty(2))
