"""From a model's name to a folder on this node: built, on the hub, in a folder, at a URI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_stub import COMMIT, TOKEN, hub

from llmft_core import InputError, LlmftError
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.storage.places import Places
from llmft_core.weights.cache import cache_folder
from llmft_core.weights.stage import ModelFolder, stage_model

SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(load_plugins())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, catalog: Catalog) -> Path:
    """The tiny model, made once."""
    folder = tmp_path_factory.mktemp("built")
    next(family for family in catalog.families() if family.name == "llama2").build("llama-2-tiny", folder)
    return folder


@pytest.fixture
def source(tmp_path: Path, built: Path) -> Path:
    """A copy of the tiny model to be changed, with things beside it that nobody needs."""
    folder = tmp_path / "source"
    shutil.copytree(built, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.00.safetensors").write_bytes(b"twice")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"twice")
    (folder / "README.md").write_text("# a model")
    return folder


def stage(name: str, catalog: Catalog, *, weights: bool = True) -> ModelFolder:
    plan = RunPlan.model_validate({"model": {"name": name}})
    return stage_model(plan, catalog, Places(catalog, None, {}), weights=weights)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def shard(folder: Path) -> None:
    """Splits a model.safetensors as large models come: two files and an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in (0, 1):
        name = f"model-{part + 1:05d}-of-00002.safetensors"
        chosen = dict(list(tensors.items())[part::2])
        save_file(chosen, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- cache and short names ----------------------------------------------------------------------------------------


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LLMFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "llmft"


def test_a_built_model_is_made_once_even_by_several_at_once(catalog: Catalog, cache: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: stage("llama-2-tiny", catalog), range(3)))
    assert len({folder.path for folder in folders}) == 1
    folder = folders[0]
    assert folder.path.is_relative_to(cache)
    assert folder.family.name == "llama2"
    assert folder.config["vocab_size"] == 4096
    assert names(folder.path) == {*SMALL, "model.safetensors"}
    before = (folder.path / "model.safetensors").stat().st_mtime_ns
    again = stage("llama-2-tiny", catalog, weights=False)
    assert (again.path, again.digest) == (folder.path, folder.digest)
    assert (folder.path / "model.safetensors").stat().st_mtime_ns == before
    assert not list(cache.rglob("*.partial"))


def test_a_build_that_was_killed_is_begun_again(catalog: Catalog, cache: Path) -> None:
    folder = stage("llama-2-tiny", catalog).path
    partial = folder.with_name(f"{folder.name}.partial")
    folder.rename(partial)
    (partial / "model.safetensors").write_bytes(b"half")
    assert (stage("llama-2-tiny", catalog).path / "model.safetensors").stat().st_size > 1_000_000


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_is_used_in_place(catalog: Catalog, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stage(str(source), catalog)
    assert found.path == source
    assert found.family.name == "llama2"
    assert stage(str(source), catalog, weights=False).digest == found.digest
    monkeypatch.chdir(source.parent)
    assert stage("./source", catalog).path == source


def test_the_digest_tells_models_apart(catalog: Catalog, source: Path) -> None:
    first = stage(str(source), catalog).digest
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (source / "model.safetensors").write_bytes(weights)
    second = stage(str(source), catalog).digest
    assert second != first
    (source / "README.md").write_text("other")
    assert stage(str(source), catalog).digest == second


def test_another_architecture_goes_to_the_fallback(catalog: Catalog, source: Path) -> None:
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert stage(str(source), catalog).family.name == "auto"


@pytest.mark.parametrize("weights", [True, False])
def test_what_a_folder_lacks_is_named(catalog: Catalog, source: Path, weights: bool) -> None:
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights in safetensors \(only pytorch_model.bin, pickles"):
        stage(str(source), catalog, weights=weights)
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no weights in safetensors \(none\)"):
        stage(str(source), catalog, weights=weights)
    (source / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        stage(str(source), catalog, weights=weights)
    (source / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json in it .*give the folder that holds config\.json"):
        stage(str(source), catalog, weights=weights)


def test_missing_shards_are_named(catalog: Catalog, source: Path) -> None:
    shard(source)
    stage(str(source), catalog)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 of 2 weight files are missing \(model-00002-of-00002\.safetensors\)"):
        stage(str(source), catalog)
    (source / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="no weight_map"):
        stage(str(source), catalog)


def test_a_folder_that_is_not_there(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder; give an existing folder"):
        stage(str(tmp_path / "nowhere"), catalog)


# --- URIs ---------------------------------------------------------------------------------------------------------


def test_a_uri_is_fetched_once_and_only_what_is_needed(catalog: Catalog, source: Path, cache: Path) -> None:
    shard(source)
    uri = source.as_uri()
    small = stage(uri, catalog, weights=False)
    assert names(small.path) == {*SMALL, "manifest.json"}
    whole = stage(uri, catalog)
    weights = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert names(whole.path) == {*SMALL, *weights, "manifest.json"}
    assert whole.digest == small.digest
    assert whole.path.is_relative_to(cache)
    manifest = json.loads((whole.path / "manifest.json").read_text())
    assert manifest["uri"] == Places(catalog, None, {}).place(uri).uri
    for name, described in manifest["files"].items():
        assert described["bytes"] == (source / name).stat().st_size
        assert len(described["sha256"]) == 64
    stamp = (whole.path / "config.json").stat().st_mtime_ns
    assert stage(uri, catalog).path == whole.path
    assert (whole.path / "config.json").stat().st_mtime_ns == stamp, "reused"


def test_a_damaged_cache_is_fetched_again(catalog: Catalog, source: Path) -> None:
    path = stage(source.as_uri(), catalog).path
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    again = stage(source.as_uri(), catalog).path
    assert (again / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_an_interrupted_fetch_goes_on(catalog: Catalog, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmft_core.storage import objects

    real = objects.Source.read_into
    fetched: list[str] = []

    def breaking(source: objects.Source, start: int, buffer: memoryview) -> None:
        if source.place.name == "model.safetensors" and "second" not in fetched:
            while len(fetched) < 3:  # it is the largest and therefore the first; the small ones come through
                time.sleep(0.01)
            raise LlmftError("the connection was lost")
        real(source, start, buffer)
        fetched.append(source.place.name)

    monkeypatch.setattr(objects.Source, "read_into", breaking)
    with pytest.raises(LlmftError, match="connection was lost"):
        stage(source.as_uri(), catalog)
    complete = set(fetched)
    fetched[:] = ["second"]
    path = stage(source.as_uri(), catalog).path
    assert (path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    kept = complete - set(fetched)
    assert kept, "what was complete is not fetched again"


def test_what_is_overwritten_at_the_source_gets_a_new_folder(catalog: Catalog, source: Path) -> None:
    first = stage(source.as_uri(), catalog)
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "max_length": 7}')
    second = stage(source.as_uri(), catalog)
    assert second.path != first.path
    assert first.path.is_dir(), "a running job may map it"
    assert second.digest != first.digest
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as large as before
    third = stage(source.as_uri(), catalog)
    assert third.digest != second.digest
    assert (third.path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_checkpoints_manifest_is_held_against_what_arrives(catalog: Catalog, source: Path) -> None:
    import hashlib

    (source / "manifest.json").write_text('{"what": "somebody else\'s"}')
    stage(source.as_uri(), catalog)
    weights = source / "model.safetensors"
    described = {"bytes": weights.stat().st_size, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    (source / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": described}}))
    first = stage(source.as_uri(), catalog)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # as large as before
    weights.write_bytes(content)
    described["sha256"] = hashlib.sha256(content).hexdigest()
    (source / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": described}}))
    second = stage(source.as_uri(), catalog)
    assert second.path != first.path
    described["sha256"] = "0" * 64
    (source / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": described}}))
    with pytest.raises(LlmftError, match=r"model\.safetensors: .* arrived, but .* were promised"):
        stage(source.as_uri(), catalog)


def test_a_uri_without_a_model(catalog: Catalog, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no file of a model there"):
        stage((tmp_path / "empty").as_uri(), catalog)
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pickles"):
        stage(source.as_uri(), catalog, weights=False)
    with pytest.raises(InputError, match="no storage backend reads nosuch://"):
        stage("nosuch://bucket/model", catalog)


# --- the hub ------------------------------------------------------------------------------------------------------


def stage_in_process(name: str, weights: bool, cache: Path, **environment: str) -> tuple[int, str]:
    """Stage in a fresh process, since the hub library reads its environment at import. Returns the exit code of the
    error (0 for none) and what was printed: the folder and digest, or the error's one line."""
    code = f"""
    from llmft_core.catalog import Catalog
    from llmft_core.errors import LlmftError
    from llmft_core.loading import load_plugins
    from llmft_core.plan import RunPlan
    from llmft_core.storage.places import Places
    from llmft_core.weights.stage import stage_model
    catalog = Catalog(load_plugins())
    try:
        plan = RunPlan.model_validate({{"model": {{"name": {name!r}}}}})
        found = stage_model(plan, catalog, Places(catalog, None, {{}}), weights={weights})
        print(found.path, found.digest, found.family.name)
    except LlmftError as error:
        print(error)
        raise SystemExit(error.exit_code)
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LLMFT_"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, "HF_HOME": str(cache / "hf"), "LLMFT_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.strip()


def test_a_hub_model(source: Path, cache: Path) -> None:
    with hub({"owner/model": source}) as (endpoint, asked):
        code, out = stage_in_process("owner/model", False, cache, HF_ENDPOINT=endpoint)
        assert code == 0, out
        path, digest, family = out.split()
        assert Path(path).name == COMMIT
        assert names(Path(path)) == SMALL
        assert family == "llama2"
        code, out = stage_in_process("owner/model", True, cache, HF_ENDPOINT=endpoint)
        assert out.split() == [path, digest, family]
        assert names(Path(path)) == {*SMALL, "model.safetensors"}
        fetched = [line for line in asked if "/resolve/" in line and line.startswith("GET")]
        assert not [line for line in fetched if "original" in line or ".bin" in line or "consolidated" in line]
    # The server is gone: what is cached is used, offline or not.
    assert stage_in_process("owner/model", True, cache, HF_ENDPOINT=endpoint)[1].split()[0] == path
    assert stage_in_process("owner/model", True, cache, HF_HUB_OFFLINE="1")[1].split()[0] == path
    assert stage_in_process("owner/model", False, cache, HF_HUB_OFFLINE="1")[1].split()[0] == path


def test_a_gated_hub_model(source: Path, cache: Path) -> None:
    repositories = {"meta-llama/Llama-2-7b-hf": source}
    with hub(repositories, gated=tuple(repositories)) as (endpoint, _):
        code, out = stage_in_process("llama-2-7b", False, cache, HF_ENDPOINT=endpoint)
        assert (code, out) == (
            2,
            f"model meta-llama/Llama-2-7b-hf: gated, and you have no access; ask for access at "
            f"{endpoint}/meta-llama/Llama-2-7b-hf and set HF_TOKEN to a token of that account",
        )
        code, out = stage_in_process("llama-2-7b", False, cache, HF_ENDPOINT=endpoint, HF_TOKEN="hf_other")
        assert code == 2
        assert out.endswith("with the account of your HF_TOKEN")
        code, out = stage_in_process("llama-2-7b", False, cache, HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
        assert code == 0, out
    code, out = stage_in_process("llama-2-7b", True, cache, HF_HUB_OFFLINE="1")
    assert code == 2, "the config is cached, the weights are not"
    assert "not (or not wholly) in the hub cache" in out


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "not found at http://127.0.0.1:"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it, or give a folder"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached (ConnectError"),
    ],
    ids=["unknown", "offline", "unreachable"],
)
def test_a_hub_model_that_cannot_be_had(cache: Path, environment: dict[str, str], expected: str) -> None:
    with hub({}) as (endpoint, _):
        code, out = stage_in_process("owner/no-such", True, cache, **{"HF_ENDPOINT": endpoint, **environment})
    assert code == 2
    assert out.startswith("model owner/no-such: ")
    assert "\n" not in out
    assert expected in out


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_model_with_pickles_only(source: Path, cache: Path, weights: bool) -> None:
    (source / "model.safetensors").unlink()
    with hub({"owner/model": source}) as (endpoint, _):
        code, out = stage_in_process("owner/model", weights, cache, HF_ENDPOINT=endpoint)
    assert code == 2
    assert "no weights in safetensors" in out
    assert weights or "pytorch_model.bin" in out
