"""What is said of workers that died, and of the cluster that is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmft_core.errors import LlmftError
from llmft_core.plan import RunPlan
from llmft_core.train.cluster import Node
from llmft_core.train.failures import KILLED, NODE_LOST, OUT_OF_MEMORY, PATIENCE, Watch, how_it_died
from llmft_core.train.job import Job
from llmft_core.train.mailbox import OnEvent
from llmft_core.train.stopping import Stop
from llmft_core.values import Placement


class Told(list[dict[str, Any]]):
    """Events that reached the view."""

    @property
    def warnings(self) -> list[str]:
        return [event["text"] for event in self if event["kind"] == "warning"]


class Cluster:
    """The nodes that there are: a and b, with a core each."""

    def __init__(self) -> None:
        self.nodes = [Node("a", "host-a", 1, 0), Node("b", "host-b", 1, 0)]

    def __call__(self) -> list[Node]:
        return self.nodes


def watching(
    on_event: OnEvent, workers: str, cluster: Cluster, micro_batch: int = 1, *, dropout: bool = False
) -> Watch:
    plan = RunPlan.from_json({"workers": workers, "micro-batch": micro_batch})
    placement = Placement(2, "cpu", "fp32", micro_batch, 6 // micro_batch, 1.0)
    job = Job(plan, placement, 10, (10,), 9, 0, (), {}, Path(), Path(), Path(), dropout=dropout)
    return Watch(on_event, job, Stop(), {}, cluster)


def begins(watch: Watch, nodes: str) -> None:
    for rank, node in enumerate(nodes):
        event = {"rank": rank, "host": f"host-{node}", "node": node, "world_size": len(nodes)}
        watch.handle({"kind": "rank", **event})


@pytest.mark.parametrize(
    ("errors", "deaths", "first"),
    [
        ([], {0: "", 1: KILLED}, f"rank 1 on host-b: {KILLED}"),
        # The collective of the rank that lives fails at once; that the other is gone takes Ray a while to see.
        (["Connection reset by peer"], {0: ""}, "rank 0 on host-a: Connection reset by peer"),
    ],
    ids=["the rank first", "the other one first"],
)
def test_a_node_that_is_found_lost_later_is_said_to_be(errors: list[str], deaths: dict[int, str], first: str) -> None:
    told, cluster = Told(), Cluster()
    watch = watching(told.append, "2", cluster)
    begins(watch, "ab")
    watch.handle({"kind": "state", "uri": "runs/r/state_00003"})
    for message in errors:
        watch.handle({"kind": "error", "rank": 0, "message": message, "ours": False})
    watch.handle({"kind": "failed", "deaths": deaths})
    assert told.warnings == [f"{first}; `llmft resume runs/r` goes on from state_00003"]
    watch.look()
    assert len(told.warnings) == 1
    del cluster.nodes[1]
    watch.look()
    watch.look()
    assert told.warnings[1:] == [f"rank 1 on host-b: {NODE_LOST}"]


def test_the_new_size_is_said() -> None:
    told, cluster = Told(), Cluster()
    watch = watching(told.append, "1:2", cluster)
    begins(watch, "ab")
    watch.handle({"kind": "failed", "deaths": {0: "", 1: KILLED}})
    del cluster.nodes[1]
    begins(watch, "a")
    lost, size = told.warnings[1:]
    assert lost == f"rank 1 on host-b: {NODE_LOST}"
    assert size.startswith("1 worker of --workers 1:2 now, instead of 2: ")
    cluster.nodes.append(Node("c", "host-c", 1, 0))
    watch.handle({"kind": "failed", "deaths": {0: OUT_OF_MEMORY}})
    begins(watch, "ac")
    assert told.warnings[-1].startswith("2 workers of --workers 1:2 now, instead of 1: ")


@pytest.mark.parametrize(
    ("micro_batch", "dropout", "said"),
    [
        (2, True, ""),
        (6, False, ""),
        (6, True, "; micro-batches have 4 rows instead of 6: dropout draws other numbers from here on"),
    ],
)
def test_other_micro_batches_are_said_where_there_is_dropout(micro_batch: int, dropout: bool, said: str) -> None:
    """Twelve rows, of two workers and then of three."""
    told = Told()
    watch = watching(told.append, "2:3", Cluster(), micro_batch, dropout=dropout)
    begins(watch, "ab")
    watch.handle({"kind": "failed", "deaths": {0: "", 1: KILLED}})
    begins(watch, "abc")
    assert told.warnings[-1].startswith("3 workers of --workers 2:3 now, instead of 2: ")
    assert told.warnings[-1].endswith(f"the weights will not be the same to the last bit{said}")


def test_errors_of_ranks_that_are_gone_explain_nothing_any_more() -> None:
    """Also where the ranks were started again before a state was there to go on from."""
    told = Told()
    watch = watching(told.append, "2:2", Cluster())
    begins(watch, "ab")
    watch.handle({"kind": "error", "rank": 0, "message": "RuntimeError: first", "ours": False})
    watch.handle({"kind": "failed", "deaths": {0: ""}})
    assert told.warnings == ["rank 0 on host-a: RuntimeError: first; no checkpoint was complete yet"]
    begins(watch, "ba")
    watch.handle({"kind": "error", "rank": 1, "message": "RuntimeError: second", "ours": False})
    assert watch.explained(RuntimeError("x")).startswith("rank 1 on host-a: RuntimeError: second; ")
    watch.raise_given_up()  # none of them is in llmft's own words


def test_an_error_in_our_own_words_comes_first() -> None:
    watch = watching(Told().append, "2:2", Cluster())
    begins(watch, "ab")
    watch.handle({"kind": "error", "rank": 1, "message": "RuntimeError: peer closed", "ours": False})
    watch.handle({"kind": "error", "rank": 0, "message": "no room", "ours": True})
    with pytest.raises(LlmftError, match=r"^rank 0 on host-a: no room; no checkpoint was complete yet$"):
        watch.raise_given_up()
    assert watch.explained(RuntimeError("x")) == "rank 0 on host-a: no room; no checkpoint was complete yet"


def test_what_a_run_waits_for_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    told, cluster = Told(), Cluster()
    watch = watching(told.append, "2:2", cluster)
    begins(watch, "ab")
    watch.handle({"kind": "state", "uri": "runs/r/state_00000"})
    del cluster.nodes[1]
    watch.handle({"kind": "failed", "deaths": {1: KILLED}})
    monkeypatch.setattr("llmft_core.train.failures.PATIENCE", 0.0)
    watch.look()
    assert len(told.warnings) == 1, f"it is not {PATIENCE} s yet"
    watch.handle({"kind": "failed", "deaths": {1: KILLED}})
    watch.look()
    assert told.warnings[-1] == (
        "waiting for room for 2 workers (2 CPUs; the cluster has 1 now): add a node, or stop, and `llmft resume runs/r "
        "--workers 1`"
    )


def test_how_a_process_died_is_read_from_what_ray_says() -> None:
    from ray import exceptions

    class HealthCheckFailed(Exception):
        """As Ray Train wraps it."""

        def __init__(self, cause: Exception) -> None:
            self.health_check_failure = cause

    assert how_it_died(HealthCheckFailed(exceptions.OutOfMemoryError("1 worker(s) were killed"))) == OUT_OF_MEMORY
    died = exceptions.RayActorError(error_msg="The actor died because its node has died. Node Id: 1e82")
    assert how_it_died(HealthCheckFailed(died)) == NODE_LOST
    assert how_it_died(exceptions.NodeDiedError("gone")) == NODE_LOST
    assert how_it_died(exceptions.RayActorError(error_msg="a possible root cause is the OOM killer")) == KILLED
    assert how_it_died(RuntimeError("out of memory")) == ""
