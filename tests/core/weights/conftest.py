"""A model on disk, an empty cache, and a mirror in S3 with a proxy before it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fault_proxy import Proxy
from mirrors import SHARDS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an empty hub cache, for each test."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model as staging sees it (nothing here loads the weights), with things beside it that nobody needs."""
    folder = tmp_path / "source"
    (folder / "original").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
    for name in SHARDS:
        (folder / name).write_bytes(os.urandom(100_000))
    for name in ("pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors", "original/config.json"):
        (folder / name).write_bytes(b"twice")
    return folder


@pytest.fixture
def uri(s3_proxy: Proxy, own_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A mirror of this test alone, reached through the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.url)
    return f"s3://bucket/{own_name}"
