"""A node that Ray is about to take away (spot preemption): a state, and the run goes on without it, or says how to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import llmft
from running import Running

RUN = ["--dataset.rows", "40", "--dataset.test-rows", "8", "--global-batch", "2", "--max-steps", "60"]
RUN += ["--checkpoint.every-epochs", "0", "--state.every-minutes", "0"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """A head without room for workers and two nodes with one core each."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # before ray is imported: it stays on loopback
    from ray.cluster_utils import Cluster

    loopback = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **loopback})
    try:
        for number in range(2):
            variables = {"LLMFT_CACHE": str(tmp_path / f"node{number}")}
            started.add_node(num_cpus=1, node_ip_address="127.0.0.1", env_vars=variables)
        started.wait_for_nodes()
        yield started
    finally:
        started.shutdown()
        monkeypatch.undo()


@pytest.fixture
def running(cluster: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    flags = ["--cluster", cluster.address, "--workers", request.param, "--name", "drained"]
    started = Running(tmp_path, "run", *RUN, *flags)
    yield started
    started.clean_up()


def drain(cluster: Any) -> None:
    """The node of a rank will be gone in two minutes."""
    ray = str(Path(sys.executable).parent / "ray")
    nodes = {node.node_id: node for node in cluster.worker_nodes}

    def has_rank(node: Any) -> bool:
        (raylet,) = [one.process.pid for one in node.all_processes["raylet"]]
        return any("RayTrainWorker" in " ".join(p.cmdline()) for p in psutil.Process(raylet).children(recursive=True))

    chosen = next(node_id for node_id, node in nodes.items() if has_rank(node))
    command = [ray, "drain-node", "--address", cluster.address, "--node-id", chosen]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    done = subprocess.run([*command, "--deadline-remaining-seconds", "120"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("running", ["1"], indirect=True)
def test_the_run_goes_on_on_another_node_to_the_same_bytes(running: Running, cluster: Any, tmp_path: Path) -> None:
    running.wait_for("step 1/")
    drain(cluster)
    assert running.end() == 0, running.text
    text = running.text
    assert "is being taken away in " in text
    assert "saving a state after this step" in text
    assert "the workers were started again and go on after optimizer step" in text
    assert ": 0 steps of 0.0 s are done again" in text, "it waited for the state"
    straight = llmft("run", *RUN, "--cluster", cluster.address, "--workers", "1", "--name", "straight", folder=tmp_path)
    assert straight.code == 0, straight.err
    runs = tmp_path / "llmft-runs" / "runs"
    weights, losses = (
        {name: work(runs / name) for name in ("drained", "straight")}
        for work in (
            lambda run: (run / "checkpoint_00000" / "model.safetensors").read_bytes(),
            lambda run: [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()],
        )
    )
    assert losses["drained"] == losses["straight"]
    assert weights["drained"] == weights["straight"]


@pytest.mark.parametrize("running", ["2"], indirect=True)
def test_without_room_on_the_other_nodes_it_ends_and_says_how_to_go_on(running: Running, cluster: Any) -> None:
    running.wait_for("step 1/")
    drain(cluster)
    assert running.end() == 1, running.text
    (line,) = [line for line in running.text.splitlines() if line.startswith("llmft: error: ")]
    assert "is being taken away, and without it 2 workers need 2 cores" in line
    assert "has 1; stopped after optimizer step " in line
    assert line.endswith("/runs/drained` goes on from state_00000")
