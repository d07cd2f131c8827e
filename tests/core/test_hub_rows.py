"""Rows that lie in repositories of the Hugging Face hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stub import hub
from plain_rows import write_parquet

from llmft_core import InputError
from llmft_core.data.hub import fetch_from_hub

READ = """
import sys
sys.path.insert(0, sys.argv[1])
from plain_rows import OnHub, rows_of
from llmft_core import InputError, SourceOptions
from llmft_core.data.sources import find_sources
option = "train" if sys.argv[2].startswith("hf://") else "source"
try:
    sources = find_sources(OnHub(SourceOptions.model_validate({option: sys.argv[2]})), None)
    for split, source in sources.items():
        print(split, rows_of(source))
except InputError as error:
    print("InputError", error)
"""


def read_in_a_process(endpoint: str, home: Path, source: str = "", **env: str) -> str:
    """In a process of its own, because the hub's client reads the environment when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **env}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(Path(__file__).parents[1] / "support"), source],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout.strip()


def test_the_hub_is_the_default_source_and_is_cached(tmp_path: Path) -> None:
    gsm8k, mine, home = tmp_path / "gsm8k", tmp_path / "mine", tmp_path / "hub"
    (gsm8k / "main").mkdir(parents=True)
    write_parquet(gsm8k / "main" / "train-00000-of-00001.parquet", [{"question": "q", "answer": "a"}])
    write_parquet(gsm8k / "main" / "test-00000-of-00001.parquet", [{"question": "t", "answer": "b"}])
    mine.mkdir()
    (mine / "train.jsonl").write_text('{"question": "mine"}\n')
    expected = "\n".join(
        f"{split} [('hf://datasets/openai/gsm8k/main/{split}-00000-of-00001.parquet:1', "
        f"{{'question': '{question}', 'answer': '{answer}'}})]"
        for split, question, answer in (("train", "q", "a"), ("test", "t", "b"))
    )
    with hub({"datasets/openai/gsm8k": gsm8k, "datasets/me/mine": mine}) as (endpoint, _):
        assert read_in_a_process(endpoint, home) == expected
        own = read_in_a_process(endpoint, home, "me/mine")
        assert own == "train [('hf://datasets/me/mine/train.jsonl:1', {'question': 'mine'})]"
        unknown = read_in_a_process(endpoint, home, "me/unknown")
        assert unknown.startswith("InputError --dataset.source: there is no folder me/unknown here and no dataset")
    assert read_in_a_process(endpoint, home) == expected  # the server is gone
    assert read_in_a_process(endpoint, home, HF_HUB_OFFLINE="1") == expected
    away = read_in_a_process(endpoint, tmp_path / "other")
    assert away == (
        f"InputError --dataset.source: openai/gsm8k/main/train-00000-of-00001.parquet is not in the hub's cache and "
        f"{endpoint} is out of reach; give your own copy with --dataset.source FOLDER"
    )


def test_shards_on_the_hub(tmp_path: Path) -> None:
    mine, home = tmp_path / "mine", tmp_path / "hub"
    (mine / "data").mkdir(parents=True)
    (mine / "README.md").write_text("# mine")
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (mine / "data" / f"{name}.jsonl").write_text(json.dumps({"f": name}))
    train = [
        f"('hf://datasets/me/mine/data/train-0000{n}-of-00002.jsonl:1', {{'f': 'train-0000{n}-of-00002'}})"
        for n in (0, 1)
    ]
    test = "test [('hf://datasets/me/mine/data/test-00000-of-00001.jsonl:1', {'f': 'test-00000-of-00001'})]"
    with hub({"datasets/me/mine": mine}) as (endpoint, _):
        one = read_in_a_process(endpoint, home, "hf://datasets/me/mine/data/train-00001-of-00002.jsonl")
        assert one == f"train [{train[1]}]"
        offline = read_in_a_process(endpoint, home, "me/mine", HF_HUB_OFFLINE="1")
        assert offline == ("InputError --dataset.source: me/mine: train-00000-of-00002 is missing (1 of 2 are there)")
        assert read_in_a_process(endpoint, home, "me/mine") == f"train [{', '.join(train)}]\n{test}"
        some = read_in_a_process(endpoint, home, "hf://datasets/me/mine/data/train-*.jsonl")
        assert some == f"train [{', '.join(train)}]"
        none = read_in_a_process(endpoint, home, "hf://datasets/me/mine/train-*.jsonl")
        assert none == (
            "InputError --dataset.train: the hub repository me/mine has no .jsonl, .jsonl.gz, .jsonl.zst or .parquet "
            "file train-*.jsonl"
        )
    assert read_in_a_process(endpoint, home, "me/mine") == f"train [{', '.join(train)}]\n{test}"
    unknown = read_in_a_process(endpoint, home, "hf://datasets/me/mine/data/train-*.jsonl")
    assert unknown == (
        "InputError --dataset.train: hf://datasets/me/mine/data/train-*.jsonl: which files match is not known without "
        "the hub: name them"
    )


def test_a_repository_without_rows(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("# mine")
    with hub({"datasets/me/mine": mine}) as (endpoint, _):
        assert read_in_a_process(endpoint, tmp_path, "me/mine") == (
            "InputError --dataset.source: the hub repository me/mine has no train file (.jsonl, .jsonl.gz, .jsonl.zst "
            "or .parquet) in its root or in data/: name one with --dataset.train hf://datasets/me/mine/PATH, or give a "
            "folder with --dataset.source FOLDER"
        )


def test_offline_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^--dataset.source: .* HF_HUB_OFFLINE is set; give your own copy .*FOLDER$"):
        fetch_from_hub("nobody/nothing", "train.jsonl")
