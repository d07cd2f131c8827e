"""`--weights.share` without Ray: who brings what, and what a node answers. The exchange itself: test_cluster.py."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from llmft_core import LlmftError
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.preflight import sharing_problems
from llmft_core.train.cluster import Cluster, Node
from llmft_core.weights.share import (
    CHUNK,
    STORE_BYTES,
    Sharer,
    bringer,
    check_same,
    first_chunks,
    requests_at_once,
)


@pytest.mark.parametrize("nodes", [2, 3, 7])
@pytest.mark.parametrize("chunks", [[1] * 40, [50], [11, 11, 11, 3, 1, 1]])
def test_each_chunk_has_one_bringer_and_all_bring_about_as_many(nodes: int, chunks: list[int]) -> None:
    first = first_chunks({f"{file:02}": count * CHUNK - 1 for file, count in enumerate(chunks)})
    brought = Counter(
        bringer(first[f"{file:02}"], index * CHUNK, nodes)
        for file, count in enumerate(chunks)
        for index in range(count)
    )
    assert set(brought) == set(range(nodes))
    assert max(brought.values()) - min(brought.values()) <= 1


def test_answers_to_all_other_nodes_fit_into_one_store() -> None:
    for nodes in range(2, 130):
        assert 1 <= requests_at_once(nodes) * (nodes - 1) * CHUNK <= STORE_BYTES


@pytest.fixture
def sharer(tmp_path: Path) -> Sharer:
    """The first of two nodes; `b` of its model is in its cache already, `a` is to come."""
    (tmp_path / "b").write_bytes(b"whole")
    sharer = Sharer(0, ("here", "there"))
    sharer.begin(tmp_path / "key", tmp_path, {"a": CHUNK + 3, "b": 5}, ["a"])
    return sharer


def test_a_node_gives_what_it_has_and_says_what_it_has_not(
    sharer: Sharer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmft_core.weights.share.MOMENT", 0.01)
    assert bytes(sharer.read("key", "b", "any", 1, 3)) == b"hol"
    assert sharer.read("key", "a", "v1", CHUNK, 3) is None, "not opened yet"
    handle = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    sharer.opened(tmp_path / "a", "v1", handle, 0)
    os.pwrite(handle, b"end", CHUNK)
    assert sharer.read("key", "a", "v1", CHUNK, 3) is None, "written, but not said to be there"
    sharer.arrived(tmp_path / "a", CHUNK)
    os.close(handle)
    os.replace(tmp_path / "a", tmp_path / "renamed")
    assert bytes(sharer.read("key", "a", "v1", CHUNK, 3)) == b"end"
    assert sharer.read("key", "a", "v1", 0, CHUNK) is None
    assert "another version" in sharer.read("key", "a", "v2", CHUNK, 3)
    assert sharer.read("other", "a", "v1", CHUNK, 3) is None, "it may have another look at the source yet"


def test_what_an_earlier_process_left_is_given_too(sharer: Sharer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(CHUNK) + b"end")
    with (tmp_path / "a").open("rb") as file:
        sharer.opened(tmp_path / "a", "v1", file.fileno(), CHUNK)
    assert len(sharer.read("key", "a", "v1", 0, CHUNK)) == CHUNK


def test_after_an_error_a_node_gives_nothing_more_and_says_why(sharer: Sharer) -> None:
    def stage(text: str, own: Sharer) -> None:
        assert own is sharer
        raise LlmftError(text)

    with pytest.raises(LlmftError, match="disk is full"):
        sharer.stage([], stage, "the disk is full")
    assert sharer.read("key", "b", "any", 0, 5) == "stopped: the disk is full"


def test_a_node_that_is_done_answers_and_denies_what_it_will_never_have(
    sharer: Sharer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path))
    (tmp_path / "mirror" / "key").mkdir(parents=True)
    noted = {"files": {"b": {"bytes": 5, "sha256": "0f", "mtime_ns": 1}}}
    (tmp_path / "mirror" / "key" / "manifest.json").write_text(json.dumps(noted))
    assert sharer.stage([], lambda own: "result") == ("result", ("key", {"b": "0f"}))
    assert bytes(sharer.read("key", "b", "any", 0, 5)) == b"whole"
    assert "another content" in sharer.read("other", "b", "any", 0, 5)


def test_nodes_that_hold_different_bytes_are_named() -> None:
    check_same({"one": ("key", {"a": "0f"}), "two": ("key", {"a": "0f"})})
    with pytest.raises(LlmftError, match="node two: a is another one than on node one"):
        check_same({"one": ("key", {"a": "0f"}), "two": ("key", {"a": "1f"})})


def test_what_nodes_cannot_split_is_refused_before_anything_starts() -> None:
    catalog = Catalog(load_plugins())
    two = Cluster("10.0.0.1:6379", (Node("1", "one", 1, 0), Node("2", "two", 1, 0)))

    def problems(cluster: Cluster, model: str, mirror: str = "") -> list[str]:
        plan = RunPlan.model_validate({"model": model, "weights": {"mirror": mirror, "share": True}})
        return [str(problem) for problem in sharing_problems(plan, cluster, catalog)]

    assert problems(two, "llama-2-7b", "s3://bucket/weights") == []
    assert problems(two, "s3://bucket/weights/model") == []
    assert problems(Cluster("local", two.nodes[:1]), "llama-2-7b") == [], "said by a warning: one node"
    for model, mirror in (("llama-2-7b", ""), ("llama-2-tiny", "s3://bucket/weights"), ("./folder", "")):
        (problem,) = problems(two, model, mirror)
        assert "comes from no mirror or URI" in problem
