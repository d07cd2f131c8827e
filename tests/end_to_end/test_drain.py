"""A node that Ray is about to take away (spot preemption): a state, and the run goes on without it, or says how to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import llmft
from hold import Hold
from nodes import Nodes, no_nodes_yet, ray_head
from running import Running

STEPS = 10
RUN = ["--dataset.rows", "40", "--dataset.test-rows", "8", "--global-batch", "2", "--max-steps", str(STEPS)]
RUN += ["--checkpoint.every-epochs", "0", "--state.every-minutes", "0"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_head() as started:
        yield started


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    """In the third step."""
    return Hold(tmp_path, in_pass=2, until_told=True)


@pytest.fixture
def nodes(cluster: Any, hold: Hold, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two, whose ranks stand still."""
    with no_nodes_yet(cluster, tmp_path_factory.mktemp("caches")) as made:
        made.add("one", **hold.environment)
        made.add("other", **hold.environment)
        yield made


@pytest.fixture
def running(nodes: Nodes, hold: Hold, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    flags = [*hold.flags, "--cluster", nodes.cluster.address, "--workers", request.param, "--name", "drained"]
    with Running(tmp_path, "run", *RUN, *flags, environment=hold.environment) as started:
        yield started


def drained_in_a_step(running: Running, nodes: Nodes, hold: Hold) -> int:
    """The run's exit code: a node is drained while its ranks stand still, and they hear of it before they go on."""
    hold.wait(running)
    nodes.drain_one()
    running.wait_for("is being taken away in ")
    hold.release()
    return running.end()


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train/loss"]) for line in lines]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("running", ["1"], indirect=True)
def test_the_run_goes_on_on_another_node_to_the_same_bytes(
    running: Running, nodes: Nodes, hold: Hold, tmp_path: Path
) -> None:
    assert drained_in_a_step(running, nodes, hold) == 0, running.text
    text = running.text
    assert "is being taken away in " in text
    assert "saving a state after this step" in text
    assert "the workers were started again and go on after optimizer step 3: " in text
    assert ": 0 steps of 0.0 s are done again" in text, "it waited for the state"
    command = ["run", *RUN, *hold.flags, "--workers", "0", "--name", "straight"]
    alone = llmft(*command, folder=tmp_path, environment={**hold.environment, "OMP_NUM_THREADS": "1"})
    assert alone.code == 0, alone.err
    drained, straight = (tmp_path / "llmft-runs" / "runs" / name for name in ("drained", "straight"))
    assert losses(drained) == losses(straight)
    weights = [(run / "checkpoint_00000" / "model.safetensors").read_bytes() for run in (drained, straight)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("running", ["1:2"], indirect=True)
def test_the_run_goes_on_with_fewer_workers(running: Running, nodes: Nodes, hold: Hold, tmp_path: Path) -> None:
    assert drained_in_a_step(running, nodes, hold) == 0, running.text
    assert "2 of 1:2 on CPU" in running.text
    assert "warning: 1 worker of --workers 1:2 now, instead of 2: " in running.text
    assert ": 0 steps of 0.0 s are done again" in running.text, "from the state that was saved for it"
    run = tmp_path / "llmft-runs" / "runs" / "drained"
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert (run / "checkpoint_00000" / ".is_checkpoint").is_file()


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("running", ["2"], indirect=True)
def test_without_room_on_the_other_nodes_it_ends_and_says_how_to_go_on(
    running: Running, nodes: Nodes, hold: Hold
) -> None:
    assert drained_in_a_step(running, nodes, hold) == 1, running.text
    (line,) = [line for line in running.text.splitlines() if line.startswith("llmft: error: ")]
    assert "is being taken away, and without it 2 workers need 2 cores" in line
    assert "has 1; stopped after optimizer step 3 of " in line
    assert line.endswith("/runs/drained` goes on from state_00000")
