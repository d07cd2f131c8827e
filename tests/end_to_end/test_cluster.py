"""A real Ray cluster of three nodes on this machine, each with a cache of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import Answer, llmft

TINY = ("--dataset.rows", "32", "--dataset.test-rows", "8", "--global-batch", "16", "--max-steps", "2")


@dataclass(frozen=True)
class ThreeNodes:
    address: str
    caches: tuple[Path, ...]

    def run(self, *flags: str, folder: Path) -> Answer:
        return llmft("run", "--cluster", self.address, *TINY, *flags, folder=folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeNodes]:
    """A head without room for workers and two nodes with one core each; the second lacks the DeepSpeed strategies."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # before ray is imported: it stays on loopback
    from ray.cluster_utils import Cluster

    caches = tuple(tmp_path_factory.mktemp(f"node{number}") for number in range(2))
    loopback = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **loopback})
    try:
        for cache, disabled in zip(caches, ("", "zero"), strict=True):
            variables = {"LLMFT_CACHE": str(cache), "LLMFT_DISABLED_PLUGINS": disabled}
            started.add_node(num_cpus=1, node_ip_address="127.0.0.1", env_vars=variables)
        started.wait_for_nodes()
        yield ThreeNodes(started.address, caches)
    finally:
        started.shutdown()
        monkeypatch.undo()


def test_each_node_gets_weights_data_and_a_worker(cluster: ThreeNodes, tmp_path: Path) -> None:
    answer = cluster.run("--workers", "2", "--name", "three", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert "SPEND A REAL CLUSTER" in answer.out
    for cache in cluster.caches:
        assert list((cache / "built").glob("*/model.safetensors"))
        assert list((cache / "data").glob("*/train/ids.npy"))
        assert not list(cache.rglob("*.partial"))
    run = tmp_path / "llmft-runs" / "runs" / "three"
    assert (run / "checkpoint_00000" / ".is_checkpoint").is_file()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert not list(run.parent.glob(".llmft-*"))  # neither a probe nor the flag of the shared folder stays behind


def test_a_node_that_lacks_a_plugin_is_named_before_training(cluster: ThreeNodes, tmp_path: Path) -> None:
    answer = cluster.run("--workers", "2", "--strategy", "zero-2", "--name", "lacking", folder=tmp_path)
    assert answer.code == 2, answer.out
    (line,) = answer.errors
    assert "(127.0.0.1)" in line
    assert "no strategy is called zero-2" in line
    assert "plugin llmft:zero is disabled" in line
    assert not (tmp_path / "llmft-runs" / "runs" / "lacking").exists()


def test_more_workers_than_the_cluster_has_are_refused(cluster: ThreeNodes, tmp_path: Path) -> None:
    answer = cluster.run("--workers", "4", folder=tmp_path)
    assert answer.code == 2, answer.out
    assert "workers: 4 workers need 4 cores" in answer.err


def test_a_root_that_nodes_do_not_share_is_refused(tmp_path: Path) -> None:
    """What runs on a node, given a flag file that the driver wrote where this node cannot see it."""
    from llmft_core.plan import RunPlan
    from llmft_core.preflight import node_problems

    plan = RunPlan.from_json({"strategy": "ddp"}).to_json()
    assert node_problems(plan, "", 0) == []
    seen = tmp_path / "runs" / "flag"
    (problem,) = node_problems(plan, str(seen), 0)
    assert f"storage.root: {seen.parent} is not the driver's folder" in problem
