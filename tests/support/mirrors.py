"""A small model in mirrors, and `llmft weights` in this process."""

from __future__ import annotations

import os
from functools import cache as cache_once
from pathlib import Path

import pytest

from llmft_core.catalog import Catalog
from llmft_core.cli.main import main
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.storage.places import Place, Places
from llmft_core.storage.transfer import upload_many, write_bytes
from llmft_core.weights.stage import ModelFolder, stage_model

CATALOG = Catalog(load_plugins())
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MODEL = {"config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS}
HUB_ID = "meta-llama/Llama-2-7b-hf"  # what llama-2-7b stands for
FLAT, CACHED = "meta-llama--Llama-2-7b-hf", "models--meta-llama--Llama-2-7b-hf"


@cache_once
def places_for(endpoint: str) -> Places:
    """Clients of S3 take a while to make: one for each server or proxy."""
    return Places(CATALOG, None, {})


def at(uri: str) -> Place:
    return places_for(os.environ.get("AWS_ENDPOINT_URL", "")).place(uri)


def lay(source: Path, uri: str) -> None:
    """A foreign mirror: every file as it is, no manifest."""
    files, folder = [path for path in source.rglob("*") if path.is_file()], at(uri)
    upload_many([(path, folder / path.relative_to(source).as_posix()) for path in files])


def stage(name: str, mirror: str, *, weights: bool = True) -> ModelFolder:
    plan = RunPlan.model_validate({"model": name, "weights": {"mirror": mirror}})
    places = places_for(os.environ.get("AWS_ENDPOINT_URL", ""))
    return stage_model(plan, CATALOG, places, weights=weights)


def weights(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[str], str]:
    """Exit code, lines of the output, and the error without the progress before it."""
    capsys.readouterr()
    code = main(["weights", *args])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("llmft:")]
    assert len(errors) == (code != 0), "an error is one line"
    return code, said.out.splitlines(), "".join(errors)


def flip(place: Place, content: bytes) -> None:
    """Other bytes, as many."""
    write_bytes(place, content[:-1] + bytes([content[-1] ^ 1]))


def same_files(folder: Path, source: Path) -> bool:
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    return names == MODEL and all((folder / name).read_bytes() == (source / name).read_bytes() for name in MODEL)
