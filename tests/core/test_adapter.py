"""Adapters, for every strategy: the same losses, exact resume, and a checkpoint that is what was trained."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import AT, TOTAL, VOCABULARY, train_adapter
from ranks import on_ranks
from servers import S3Server
from tables import tiny_llama
from toy_tokenizers import save_toy_tokenizer

from llmft_core.cli.main import main

# Every matrix is partitioned, and the optimizer works through several groups of them.
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000}}
STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "zero-2": "zero-2",
    "zero-3": "zero-3",
    "zero-2 + offload": {"name": "zero-2", "offload-optimizer": "cpu"},
    "zero-3 + optimizer": {"name": "zero-3", "offload-optimizer": "cpu", "config": SMALL},
    "zero-3 + all": {"name": "zero-3", "offload": "all", "config": SMALL},
}
OPTIONS = {"rank": 4, "dropout": 0.1}

Trained = tuple[Path, list[list[dict[str, Any]]]]
"""A run's folder, and each rank's answers: straight through, and from the middle on."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("base"))
    (folder / "tokenizer").mkdir()
    save_toy_tokenizer(folder / "tokenizer", VOCABULARY)
    return folder


def train_all(precision: str, base: Path, folder: Path) -> dict[str, Trained]:
    """By strategy."""
    runs = {name: folder / name for name in STRATEGIES}
    cases = [
        (STRATEGIES[name], precision, 2, str(base), str(run), OPTIONS, step)
        for name, run in runs.items()
        for step in (0, AT)
    ]
    ranks = on_ranks(2, train_adapter, cases)
    return {
        name: (run, [answers[2 * number : 2 * number + 2] for answers in ranks])
        for number, (name, run) in enumerate(runs.items())
    }


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """By strategy, in fp32."""
    return train_all("fp32", base, tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="module")
def trained_in_bf16(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """By strategy."""
    return train_all("bf16", base, tmp_path_factory.mktemp("bf16"))


def test_all_strategies_train_the_same(trained: dict[str, Trained]) -> None:
    _, ((first, _), _) = trained["ddp"]
    for strategy in [*STRATEGIES][1:]:
        _, ((other, _), _) = trained[strategy]
        np.testing.assert_allclose(other["loss"], first["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["norm"], first["norm"], rtol=1e-4)
        for name, values in first["began"].items():
            assert np.array_equal(other["began"][name], values), f"{strategy} begins {name} with other numbers"
    assert first["loss"][-1] < first["loss"][0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_is_the_same_bit_for_bit(
    strategy: str, precision: str, trained: dict[str, Trained], trained_in_bf16: dict[str, Trained]
) -> None:
    run, ranks = (trained if precision == "fp32" else trained_in_bf16)[strategy]
    for straight, resumed in ranks:
        assert straight["fragments"].keys() == resumed["fragments"].keys() != set()
        for key, values in straight["fragments"].items():
            assert np.array_equal(values, resumed["fragments"][key]), key
        assert np.array_equal(straight["logits"], resumed["logits"])
    assert ranks[0][1]["loss"] == ranks[0][0]["loss"][AT:]
    manifest = json.loads((run / "state_00000" / "manifest.json").read_text())
    held = {key.split("/", 2)[2] for fragments in manifest["fragments"].values() for key in fragments}
    assert held == set(ranks[0][0]["began"]), "the frozen model is no part of the state"


def test_on_another_number_of_ranks_the_same_is_dropped(
    trained: dict[str, Trained], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws by the micro-batch's place in the global batch, and micro-batches stay as they were."""
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    cases = []
    for name in ("ddp", "zero-3"):
        shutil.copytree(trained[name][0] / "state_00000", tmp_path / name / "state_00000")
        cases.append((STRATEGIES[name], "fp32", 1, str(base), str(tmp_path / name), OPTIONS, AT))
    alone = on_ranks(1, train_adapter, cases)[0]
    for name, resumed in zip(("ddp", "zero-3"), alone, strict=True):
        _, ((straight, _), _) = trained[name]
        assert len(resumed["loss"]) == TOTAL - AT
        assert resumed["loss"] == pytest.approx(straight["loss"][AT:], rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_that_is_trained_moves_also_the_rows_of_special_tokens(strategy: str, trained: dict[str, Trained]) -> None:
    _, ((straight, _), _) = trained[strategy]
    for name, values in straight["began"].items():
        assert not np.array_equal(values, straight["ended"][name]), name
    rows = {name: values for name, values in straight["ended"].items() if "token_adapter" in name}
    assert {name.split(".token_adapter")[0] for name in rows} == {"model.embed_tokens", "lm_head"}
    for name, values in rows.items():
        assert values.shape == (4, 32)
        assert (values != straight["began"][name]).any(axis=1).all(), "each row of them"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 under transformers 5.23
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_peft_itself_loads_what_was_trained(strategy: str, trained: dict[str, Trained], base: Path) -> None:
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
    logits = logits_of(PeftModel.from_pretrained(model, folder))
    np.testing.assert_allclose(logits, straight["logits"], rtol=1e-5, atol=1e-5)


def test_merged_it_is_one_model_that_answers_as_base_and_adapter(
    trained: dict[str, Trained],
    tmp_path: Path,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through a real S3 server: push the adapter, merge it there, fetch the whole model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, ((straight, _), _) = trained["zero-3"]
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    reach = ("--backends.s3.endpoint-url", s3_server.endpoint_url)
    adapter, whole = (f"s3://{s3_server.bucket}/{name}/checkpoint_00000" for name in ("adapter", "whole"))

    def llmft(*args: str) -> tuple[int, str, str]:
        code = main([*args, *reach])
        return code, *capsys.readouterr()

    assert llmft("checkpoint", "pull", str(run / "checkpoint_00000"), str(tmp_path / "pulled"))[0] == 0
    assert llmft("checkpoint", "push", str(tmp_path / "pulled"), adapter)[0] == 0
    code, out, err = llmft("checkpoint", "merge", adapter, "--out", whole)
    assert code == 0, err
    assert whole in out
    assert llmft("checkpoint", "verify", whole)[0] == 0
    assert llmft("checkpoint", "pull", whole, str(tmp_path / "model"))[0] == 0
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", ".is_checkpoint"} <= names
    assert not [name for name in names if name.startswith("adapter")]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "model")) == VOCABULARY
    np.testing.assert_allclose(logits_of(model), straight["logits"], rtol=1e-5, atol=1e-5)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["step"] == TOTAL
    assert manifest["provenance"]["merged"]["adapter"] == adapter
    code, _, err = llmft("checkpoint", "merge", whole, "--out", f"{whole}-again")
    assert (code, "whole model already" in err) == (2, True)
    code, _, err = llmft("checkpoint", "merge", adapter, "--out", whole)
    assert (code, "is not empty" in err) == (2, True)

    question = ("how many", "--raw", "--max-new-tokens", "4")
    asked = [llmft("generate", place, *question) for place in (adapter, whole)]
    assert [code for code, _, _ in asked] == [0, 0], asked
    assert asked[0][1] == asked[1][1]


def test_another_base_is_refused(
    trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained["ddp"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "checkpoint_00000", "checkpoint_00000")
    manifest = json.loads(Path("checkpoint_00000/manifest.json").read_text())
    other = tiny_llama(tmp_path / "other", seed=1)
    small = tiny_llama(tmp_path / "small", hidden_size=16)
    for model, expected in (
        (str(tmp_path / "gone"), "no such folder; give an existing folder, a hub id (owner/name) or a URI; --base"),
        (str(other), "is not the model that"),
    ):
        manifest["provenance"]["plan"]["model"]["name"] = model
        text = json.dumps(manifest).encode()
        Path("checkpoint_00000/manifest.json").write_bytes(text)
        vouched = {"manifest_sha256": hashlib.sha256(text).hexdigest()}
        Path("checkpoint_00000/.is_checkpoint").write_text(json.dumps(vouched))
        capsys.readouterr()
        assert main(["checkpoint", "merge", "checkpoint_00000", "--out", "whole"]) == 2
        err = capsys.readouterr().err
        assert expected in err
        assert len(err.splitlines()) == 1
        assert not Path("whole").exists()
    assert main(["checkpoint", "merge", "checkpoint_00000", "--out", "whole", "--base", str(small)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "the adapter does not fit the base model" in line
    assert not Path("whole").exists()


def logits_of(model: Any) -> Any:
    """Of the row that `train_adapter` asks about."""
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 97, 5, 98, 99, 7, 100]])).logits.numpy()


def test_the_manifest_says_what_was_trained(trained: dict[str, Trained]) -> None:
    run, ((straight, _), _) = trained["zero-3"]
    manifest = json.loads((run / "checkpoint_00000" / "manifest.json").read_text())
    assert manifest["tensors"]["trained"] == manifest["tensors"]["changed"] == len(straight["began"])
    assert manifest["step"] == TOTAL
    assert "adapter_model.safetensors" in manifest["files"]


def test_in_bf16_nothing_but_the_adapter_is_fp32(trained_in_bf16: dict[str, Trained]) -> None:
    """DDP holds what it trains in fp32; of a frozen weight it needs no second copy."""
    straight = [ranks[0][0] for _, ranks in trained_in_bf16.values()]
    for answer in straight:
        assert answer["frozen_types"] == {"torch.bfloat16"}
        assert answer["loss"][-1] < answer["loss"][0]
        np.testing.assert_allclose(answer["loss"], straight[0]["loss"], rtol=1e-2)
