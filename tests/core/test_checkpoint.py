"""Export and publishing, for every strategy: what is written is what was trained, or nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from tables import tiny_llama
from toy_tokenizers import save_toy_tokenizer
from training import VOCABULARY, train_and_export

from llmft_core.checkpoint.export import Exported, shard_names, split_into_shards
from llmft_core.checkpoint.publish import publish, verify_export
from llmft_core.errors import LlmftError, one_line


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("base"))
    (folder / "tokenizer").mkdir()
    save_toy_tokenizer(folder / "tokenizer")
    return folder


@pytest.mark.parametrize(
    ("strategy", "dtype", "precision"),
    [("ddp", "fp32", "fp32"), ("zero-2", "bf16", "bf16"), ("zero-3", "fp32", "bf16"), ("zero-3", "bf16", "bf16")],
)
def test_the_checkpoint_is_the_trained_model(
    strategy: str, dtype: str, precision: str, base: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    answers = on_ranks(2, train_and_export, strategy, str(base), str(tmp_path), dtype, precision)
    trained, exported = answers[0]
    assert answers[1] == ({}, None)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 1
    assert names == shard_names(len(names))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(trained)
    assert exported.trained == len(trained)
    assert exported.changed == len(trained) - len(exported.unchanged) > 0.8 * len(trained)
    verify_export(tmp_path, exported)

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert str(model.dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]
    for name, parameter in model.named_parameters():
        assert (parameter.detach().float().numpy() == trained[name]).all(), name
    assert model.config.vocab_size == VOCABULARY
    assert model.config.use_cache
    assert 7 in model.generation_config.eos_token_id
    with safe_open(base / "model.safetensors", "pt") as before:
        moved = [name for name in before.keys() if not name.startswith("lm_head")]  # noqa: SIM118
        assert any(
            (before.get_tensor(name).numpy() != trained[name][: before.get_slice(name).get_shape()[0]]).any()
            for name in moved
        )


def test_a_large_tensor_has_a_shard_of_its_own_and_the_order_is_kept() -> None:
    shapes = {"a": (10,), "b": (100,), "c": (10,), "d": (10,)}
    assert split_into_shards(shapes, 4, limit=100) == [["a"], ["b"], ["c", "d"]]
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Exported]:
    """A folder as `export` leaves it, without training."""
    folder = tiny_llama(tmp_path / "export")
    save_toy_tokenizer(folder)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return folder, Exported(shapes, "F32", len(shapes), len(shapes), (), ())


def place_in(folder: Path) -> Any:
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places

    return Places(Catalog(load_plugins()), None, {}).place(str(folder))


def test_publishing_marks_last_and_removes_the_local_copy(exported: tuple[Path, Exported], tmp_path: Path) -> None:
    import hashlib

    folder, facts = exported
    target = tmp_path / "runs" / "checkpoint_00000"
    size = publish(folder, place_in(target), facts, {"step": 3})
    manifest_bytes = (target / "manifest.json").read_bytes()
    manifest = json.loads(manifest_bytes)
    assert not folder.exists()
    assert manifest["step"] == 3
    assert size == sum(described["bytes"] for described in manifest["files"].values())
    for name, described in manifest["files"].items():
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == described["sha256"]
    marker = json.loads((target / ".is_checkpoint").read_text())
    assert marker["manifest_sha256"] == hashlib.sha256(manifest_bytes).hexdigest()


def test_a_file_that_is_not_the_model_is_not_published(exported: tuple[Path, Exported], tmp_path: Path) -> None:
    folder, facts = exported
    wrong = Exported({**facts.shapes, "model.norm.weight": (33,)}, "F32", 1, 1, (), ())
    target = tmp_path / "runs" / "checkpoint_00000"
    with pytest.raises(LlmftError, match=r"not the model's.*local copy is kept in"):
        publish(folder, place_in(target), wrong, {})
    assert folder.is_dir()
    assert not (target / ".is_checkpoint").exists()


def test_a_vocabulary_that_contradicts_the_embeddings_is_refused(exported: tuple[Path, Exported]) -> None:
    folder, facts = exported
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 5}))
    with pytest.raises(LlmftError, match="vocab_size 5, embeddings 97"):
        verify_export(folder, facts)


def test_a_model_that_did_not_move_or_is_not_finite_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from llmft_core.checkpoint.export import Comparison

    folder = tiny_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    same = Comparison(folder)
    for name, tensor in weights.items():
        same.look_at(name, tensor, trained=True)
    with pytest.raises(LlmftError, match="differs from the base"):
        same.judge()
    with pytest.raises(LlmftError, match="NaN or infinity"):
        same.look_at("x", torch.tensor([float("nan")]), trained=True)


def test_publishing_in_the_background_announces_what_is_complete(
    exported: tuple[Path, Exported], tmp_path: Path
) -> None:
    from llmft_core.checkpoint.background import BackgroundPublisher

    folder, facts = exported
    target = place_in(tmp_path / "runs" / "checkpoint_00000")
    announced: list[tuple[str, int, int, bool]] = []

    def announce(place: Any, size: int, seconds: float, said: Any) -> None:
        complete = (tmp_path / "runs" / "checkpoint_00000" / ".is_checkpoint").is_file()
        announced.append((place.name, size, said["step"], complete))

    with BackgroundPublisher(announce) as publisher:
        publisher.submit(folder, target, facts, {"step": 3})
    ((name, size, step, complete),) = announced
    assert (name, step, complete) == ("checkpoint_00000", 3, True)
    assert size > 0


def test_a_failed_upload_stops_the_run_at_the_next_checkpoint_and_keeps_the_local_copy(
    exported: tuple[Path, Exported], tmp_path: Path
) -> None:
    from llmft_core.checkpoint.background import BackgroundPublisher

    folder, facts = exported
    (tmp_path / "blocked").write_text("a file where a folder should be")
    target = place_in(tmp_path / "blocked" / "checkpoint_00000")
    announced: list[Any] = []
    publisher = BackgroundPublisher(lambda *said: announced.append(said))
    publisher.submit(folder, target, facts, {"step": 3})
    with pytest.raises(LlmftError, match="the local copy is kept in") as caught:
        publisher.wait()
    assert str(folder) in str(caught.value)
    assert (folder / "model.safetensors").is_file()
    assert not announced
    publisher.executor.shutdown()


def test_an_error_in_training_carries_that_of_the_last_upload(exported: tuple[Path, Exported], tmp_path: Path) -> None:
    from llmft_core.checkpoint.background import BackgroundPublisher

    folder, facts = exported
    (tmp_path / "blocked").write_text("")
    with (  # noqa: PT012 - what is raised inside has to pass through the publisher
        pytest.raises(LlmftError, match="diverged") as caught,
        BackgroundPublisher(lambda *said: None) as publisher,
    ):
        publisher.submit(folder, place_in(tmp_path / "blocked" / "checkpoint_00000"), facts, {})
        raise LlmftError("training has diverged")
    assert one_line(caught.value).startswith("training has diverged; and the last checkpoint failed too: ")
    assert "the local copy is kept" in one_line(caught.value)
