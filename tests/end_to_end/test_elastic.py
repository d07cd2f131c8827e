"""Nodes of a real Ray cluster that are lost and come: the run goes on with what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import llmft
from hold import Hold
from nodes import Nodes, no_nodes_yet, ray_head
from running import Running

RUN = ["--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "8", "--epochs", "6"]
RUN += ["--checkpoint.every-epochs", "0", "--strategy", "zero-2", "--state.every-steps", "2", "--max-failures", "1"]
STEPS = 48


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_head(health_check_period_ms=1000) as started:  # a lost node is found in 5 s rather than in 15
        yield started


@pytest.fixture
def nodes(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with no_nodes_yet(cluster, tmp_path_factory.mktemp("caches")) as made:
        yield made


def run_of(nodes: Nodes, workers: str, name: str) -> list[str]:
    return ["run", "--cluster", nodes.cluster.address, "--workers", workers, "--name", name, *RUN]


def steps_logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(1500)
def test_a_lost_node_leaves_fewer_workers(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("stays")
    goes = nodes.add("goes")
    with Running(tmp_path, *run_of(nodes, "1:2", "shrinks")) as running:
        running.wait_for("state_00001 complete")
        nodes.lose(goes)
        assert running.end() == 0, running.text
    text = running.text
    assert "2 of 1:2 on CPU" in text
    # What is heard first: of the rank, of its node, or of the other rank's collective.
    assert re.search(r"^warning: rank \d on \S+: .*; `llmft resume \S+` goes on", text, re.M)
    assert len(re.findall(r"^warning: rank \d on \S+: its node was lost", text, re.M)) == 1
    assert "warning: 1 worker of --workers 1:2 now, instead of 2: " in text
    assert re.search(r"^warning: .* go on after optimizer step \d+: \d+ steps? of .* done again$", text, re.M)
    assert re.search(r"^the workers were started again 1 time: ", text, re.M)
    run = tmp_path / "llmft-runs" / "runs" / "shrinks"
    assert steps_logged(run) == list(range(1, STEPS + 1))
    assert (run / "checkpoint_00000" / ".is_checkpoint").is_file()


@pytest.mark.timeout(1500)
def test_a_node_that_joins_replaces_a_lost_one(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("first")
    second = nodes.add("second")
    straight = llmft(*run_of(nodes, "2", "straight"), folder=tmp_path)
    assert straight.code == 0, straight.err
    with Running(tmp_path, *run_of(nodes, "2", "replaced")) as running:
        running.wait_for("state_00001 complete")
        nodes.lose(second)
        running.wait_for("its node was lost")
        nodes.add("third")
        assert running.end() == 0, running.text
    assert "… a node joined: it gets the prepared data and the weights" in running.text
    assert "instead of" not in running.text
    for wanted in ("built/*/model.safetensors", "data/*/train/ids.npy", "tokenizers/*/tokenizer.json"):
        assert len(list((nodes.caches / "third").glob(wanted))) == 1, wanted
    runs = tmp_path / "llmft-runs" / "runs"
    assert steps_logged(runs / "replaced") == list(range(1, STEPS + 1))
    weights = [
        (runs / name / "checkpoint_00000" / "model.safetensors").read_bytes() for name in ("straight", "replaced")
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_node_that_joins_is_used_where_workers_start_anyway(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("first")
    flags = ["--epochs", "30", "--max-failures", "9"]
    with Running(tmp_path, *run_of(nodes, "1:2", "grows"), *flags) as running:
        running.wait_for("state_00000 complete")
        nodes.add("second")
        kills = 0
        while "warning: 2 workers of --workers 1:2 now, instead of 1: " not in running.text:
            assert kills < 9, running.text  # Ray Train looks at the cluster every 20 s
            (rank,) = [rank for node in nodes.there for rank in nodes.ranks(node)]
            rank.kill()
            kills += 1
            running.wait_until(
                lambda text, kills=kills: " complete: " in "".join(text.split("were started again and go on")[kills:]),
                "a state after the restart",
            )
        assert running.end() == 0, running.text
    assert "… a node joined: it gets the prepared data and the weights" in running.text
    assert len(list((nodes.caches / "second").glob("built/*/model.safetensors"))) == 1
    assert steps_logged(tmp_path / "llmft-runs" / "runs" / "grows") == list(range(1, 5 * STEPS + 1))


@pytest.mark.timeout(1500)
def test_a_worker_that_the_memory_monitor_kills_is_said_to_be_one(nodes: Nodes, tmp_path: Path) -> None:
    """Ray's own monitor, with a limit 3 GB above what this machine uses now; this test takes them while the rank stands
    still."""
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + 3 * 2**30) / memory.total
    assert limit < 1, "this machine has not the 3 GB of memory that this test takes"
    hold = Hold(tmp_path, in_pass=6)  # a pass a step: state_00001 is of the fourth
    of_ray = {"RAY_memory_usage_threshold": str(limit), "RAY_memory_monitor_refresh_ms": "100"}
    nodes.add("small", **of_ray, **hold.environment)
    # More than one failure, because others on this machine may take memory too.
    command = [*run_of(nodes, "1", "fat"), *hold.flags, "--max-failures", "3"]
    with Running(tmp_path, *command, environment=hold.environment) as running:
        hold.wait(running)
        running.wait_for("state_00001 complete")
        taken: list[bytes] = []

        def is_said(text: str) -> bool:
            """Takes another piece for as long as the limit is not passed, whatever others take or give back."""
            now = psutil.virtual_memory()
            if now.total - now.available < limit * now.total + 2**28:
                taken.append(b"x" * 2**26)
            return "out of memory" in text

        running.wait_until(is_said, "word of the memory monitor")
        taken.clear()
        hold.release()
        assert running.end() == 0, running.text
    assert re.search(
        r"^warning: rank 0 on \S+: Ray's memory monitor killed the process: its machine was out of memory: lower "
        r"--micro-batch or .*; `llmft resume \S+fat` goes on from state_\d+$",
        running.text,
        re.M,
    )
    assert steps_logged(tmp_path / "llmft-runs" / "runs" / "fat") == list(range(1, STEPS + 1))
