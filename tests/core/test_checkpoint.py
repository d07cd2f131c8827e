"""Export and publishing, for every strategy: what is written is what was trained, or nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from tables import tiny_llama
from toy_tokenizers import save_toy_tokenizer
from training import VOCABULARY, export_both_ways, save_once, train_and_export

from llmft_core.checkpoint.background import Background
from llmft_core.checkpoint.export import Comparison, Exported, judge
from llmft_core.checkpoint.publish import publish, publish_part, verify_folder, verify_weights
from llmft_core.checkpoint.shards import divide, shard_names, split
from llmft_core.errors import LlmftError, UselessWeights, one_line


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
    trained, first, shapes = answers[0]
    nothing, second, same = answers[1]
    assert (nothing, same) == ({}, shapes)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 1
    assert names == shard_names(len(names))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(trained)
    assert first.shapes.keys() & second.shapes.keys() == set()
    assert {**first.shapes, **second.shapes} == shapes == {name: array.shape for name, array in trained.items()}
    unchanged = [*first.unchanged, *second.unchanged]
    assert first.changed + second.changed == len(trained) - len(unchanged) > 0.8 * len(trained)
    verify_weights(tmp_path, Exported(shapes, first.dtype, frozenset(), 1, (), ()))
    verify_folder(tmp_path, shapes)

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


@pytest.mark.parametrize(
    ("strategy", "precision", "tied"), [("zero-3", "bf16", True), ("zero-3", "fp32", False), ("zero-2", "bf16", True)]
)
def test_files_of_several_ranks_are_what_accelerate_gathers_on_one(
    strategy: str, precision: str, tied: bool, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    base, target = tiny_llama(tmp_path / "base", tie_word_embeddings=tied), tmp_path / "target"
    target.mkdir()
    gathered, nothing = on_ranks(2, export_both_ways, strategy, str(base), str(target), precision)
    assert nothing == {}
    written: dict[str, Any] = {}
    for file in sorted(target.glob("*.safetensors")):
        written |= load_file(file)
    again = {"lm_head.weight"} if tied else set()
    assert set(written) == set(gathered) - again
    dtype = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[precision]
    assert {str(tensor.dtype) for tensor in written.values()} == {dtype}
    for name, tensor in written.items():
        assert tensor.float().numpy().tobytes() == gathered[name].tobytes(), name
    if tied:
        assert gathered["lm_head.weight"].tobytes() == gathered["model.embed_tokens.weight"].tobytes()


def test_without_room_for_a_copy_training_waits_and_the_checkpoint_is_the_same(base: Path, tmp_path: Path) -> None:
    kinds, files = {}, {}
    for room in (True, False):
        store = tmp_path / str(room)
        events, _ = on_ranks(2, save_once, str(base), str(store), room)
        kinds[room] = [event["kind"] for event in events]
        manifest = json.loads((store / "checkpoint_00000" / "manifest.json").read_text())
        files[room] = {name: described["sha256"] for name, described in manifest["files"].items()}
    assert files[True] == files[False]
    assert kinds[True] == ["metrics", "stall", "checkpoint"]
    assert kinds[False] == ["metrics", "warning", "stall", "checkpoint"]


def test_a_large_tensor_has_a_shard_of_its_own_and_the_order_is_kept() -> None:
    shapes = {"a": (10,), "b": (100,), "c": (10,), "d": (10,)}
    assert split(shapes, 4, limit=100) == [["a"], ["b"], ["c", "d"]]
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_files_are_dealt_out_to_the_ranks_but_not_made_tiny_for_them() -> None:
    seven_billion = {f"layer{number}": (100_000_000,) for number in range(67)}  # 13.4 GB in bf16
    files = divide(seven_billion, 2, world_size=16)
    assert {shard.writer for shard in files} == set(range(14))
    assert [name for shard in files for name in shard.names] == list(seven_billion)
    assert [len(shard.names) for shard in divide(seven_billion, 2, world_size=2)] == [25, 25, 17], "5 GB at most"
    assert len(divide({"a": (1000,), "b": (1000,)}, 2, world_size=8)) == 1


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Exported]:
    """A folder as `export` leaves it, without training."""
    folder = tiny_llama(tmp_path / "export")
    save_toy_tokenizer(folder)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return folder, Exported(shapes, "F32", frozenset(), len(shapes), (), ())


def place_in(folder: Path) -> Any:
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places

    return Places(Catalog(load_plugins()), None, {}).place(str(folder))


def test_publishing_marks_last_and_removes_the_local_copy(exported: tuple[Path, Exported], tmp_path: Path) -> None:
    import hashlib

    folder, facts = exported
    target = tmp_path / "runs" / "checkpoint_00000"
    size = publish(folder, place_in(target), facts, {"step": 3}, shapes=facts.shapes, trained=len(facts.shapes))
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
    wrong = Exported({**facts.shapes, "model.norm.weight": (33,)}, "F32", frozenset(), 1, (), ())
    target = tmp_path / "runs" / "checkpoint_00000"
    with pytest.raises(LlmftError, match=r"not the model's.*local copy is kept in"):
        publish(folder, place_in(target), wrong, {}, shapes=facts.shapes, trained=1)
    assert folder.is_dir()
    assert not (target / ".is_checkpoint").exists()


def test_a_vocabulary_that_contradicts_the_embeddings_is_refused(exported: tuple[Path, Exported]) -> None:
    folder, facts = exported
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 5}))
    with pytest.raises(LlmftError, match="vocab_size 5, embeddings 97"):
        verify_folder(folder, facts.shapes)


def test_a_model_that_did_not_move_or_is_not_finite_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = tiny_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    same = Comparison(folder)
    for name, tensor in weights.items():
        same.look_at(name, tensor, trained=True)
    with pytest.raises(LlmftError, match="differs from the base"):
        judge([Exported({}, "F32", frozenset(), same.changed, tuple(same.unchanged), ())])
    with pytest.raises(LlmftError, match="NaN or infinity"):
        same.look_at("x", torch.tensor([float("nan")]), trained=True)


def test_two_ranks_meet_in_the_storage(exported: tuple[Path, Exported], tmp_path: Path) -> None:
    """Rank 1 may be ready long before rank 0, or after it."""
    folder, facts = exported
    names = sorted(facts.shapes)
    mine, theirs = split_files(folder, names[:3], names[3:], tmp_path / "other")
    target = place_in(tmp_path / "runs" / "checkpoint_00000")
    with Background() as other:
        other.submit(lambda: publish_part(tmp_path / "other", target, theirs, 1))
        size = publish(folder, target, mine, {}, shapes=facts.shapes, trained=len(names), writers=2)
    found = sorted(path.name for path in (tmp_path / "runs" / "checkpoint_00000").iterdir())
    assert "manifest.part-1" not in found
    assert {"a.safetensors", "b.safetensors", ".is_checkpoint"} <= set(found)
    manifest = json.loads((tmp_path / "runs" / "checkpoint_00000" / "manifest.json").read_text())
    assert set(manifest["files"]) == {*found} - {"manifest.json", ".is_checkpoint"}
    assert size == sum(described["bytes"] for described in manifest["files"].values())
    assert manifest["tensors"]["changed"] == len(names)
    assert not folder.exists()
    assert not (tmp_path / "other").exists()


def test_a_rank_that_fails_tells_rank_0_and_both_keep_their_files(
    exported: tuple[Path, Exported], tmp_path: Path
) -> None:
    folder, facts = exported
    names = sorted(facts.shapes)
    mine, theirs = split_files(folder, names[:3], names[3:], tmp_path / "other")
    (tmp_path / "other" / "b.safetensors").write_bytes(b"not what it was")
    target = place_in(tmp_path / "runs" / "checkpoint_00000")
    background = Background()
    background.submit(lambda: publish_part(tmp_path / "other", target, theirs, 1))
    with pytest.raises(LlmftError, match=r"rank 1's part of .* could not be published") as caught:
        publish(folder, target, mine, {}, shapes=facts.shapes, trained=1, writers=2)
    assert str(folder) in str(caught.value)
    assert str(tmp_path / "other") in str(caught.value)
    with pytest.raises(LlmftError, match="rank 1's part"):
        background.__exit__(None, None, None)
    assert folder.is_dir()
    assert (tmp_path / "other").is_dir()
    assert not (tmp_path / "runs" / "checkpoint_00000" / ".is_checkpoint").exists()


def split_files(folder: Path, first: list[str], second: list[str], other: Path) -> tuple[Exported, Exported]:
    """The folder's weights as the files of two ranks, the second's in a folder of its own."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    other.mkdir()
    parts = []
    for names, path in ((first, folder / "a.safetensors"), (second, other / "b.safetensors")):
        save_file({name: weights[name] for name in names}, path, metadata={"format": "pt"})
        shapes = {name: tuple(weights[name].shape) for name in names}
        parts.append(Exported(shapes, "F32", frozenset(), len(names), (), ()))
    return parts[0], parts[1]


def test_work_in_the_background_is_waited_for() -> None:
    done: list[int] = []
    with Background() as background:
        background.submit(lambda: done.append(1))
    assert done == [1]
    assert not background.busy


def test_work_that_failed_is_told_at_once_and_is_the_error_of_the_end() -> None:
    done: list[int] = []
    told: list[Exception] = []

    def fail() -> None:
        raise LlmftError("the local copy is kept in x")

    with pytest.raises(LlmftError, match="kept in x"), Background(told.append) as background:  # noqa: PT012
        background.submit(fail)
        assert background.pending is not None
        background.pending.exception()
        assert [str(error) for error in told] == ["the local copy is kept in x"]
        background.submit(lambda: done.append(2))
    assert done == [2]
    with Background() as background:
        background.submit(fail)
        background.wait()
        background.forgive()


@pytest.mark.parametrize("wrapped", [False, True])
def test_useless_weights_end_training_at_the_next_one(wrapped: bool) -> None:
    def find() -> None:
        try:
            raise UselessWeights("weight holds NaN")
        except UselessWeights as error:
            if wrapped:
                raise LlmftError(f"not published: {error}") from error
            raise

    background = Background()
    background.submit(find)
    with pytest.raises(LlmftError, match="weight holds NaN"):
        background.submit(find)


def test_an_error_in_training_carries_that_of_the_last_upload() -> None:
    def fail() -> None:
        raise LlmftError("the local copy is kept in x")

    with pytest.raises(LlmftError, match="diverged") as caught, Background() as background:  # noqa: PT012
        background.submit(fail)
        raise LlmftError("training has diverged")
    assert one_line(caught.value) == (
        "training has diverged; and the last checkpoint failed too: the local copy is kept in x"
    )
