"""`--workers MIN:MAX`: what is allowed, and how each number of workers shares the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmft_core import Options, Strategy, hookimpl
from llmft_core.catalog import Catalog
from llmft_core.errors import LlmftError, Problem, Problems
from llmft_core.loading import load_plugins
from llmft_core.placing import place
from llmft_core.plan import RunPlan
from llmft_core.plan_sources import parse_plan
from llmft_core.train.cluster import Cluster, Node
from llmft_core.train.job import Job
from llmft_core.values import Placement, WorkerRange


def cluster(*cores: int) -> Cluster:
    """Nodes with so many cores, elsewhere."""
    return Cluster("head:6379", tuple(Node(str(number), "host", count, 0) for number, count in enumerate(cores)))


def placed(there: Cluster, **settings: Any) -> tuple[RunPlan, Placement]:
    plan = RunPlan.from_json({"strategy": "ddp", **settings})
    return place(plan, there, Catalog(load_plugins()))


@pytest.mark.parametrize(
    ("given", "kept", "sizes"),
    [
        (2, 2, WorkerRange(2, 2)),
        ("2", 2, WorkerRange(2, 2)),
        ("1:2", "1:2", WorkerRange(1, 2)),
        ("4:4", 4, WorkerRange(4, 4)),
        (0, 0, WorkerRange(0, 0)),
        (None, None, None),
    ],
)
def test_a_number_or_a_range(given: Any, kept: Any, sizes: WorkerRange | None) -> None:
    plan = RunPlan.from_json({"workers": given})
    assert plan.workers == kept
    assert plan.worker_range == sizes
    assert RunPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("given", ["0:2", "3:1", "1:", ":2", "-1", "two", -1, 1.5, "1:2:3"])
def test_other_words_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="MIN:MAX"):
        RunPlan.from_json({"workers": given})


def test_yaml_does_not_read_a_range_in_base_60() -> None:
    assert parse_plan(b"workers: 1:2\nglobal-batch: 32\n", "p.yaml").data == {"workers": "1:2", "global-batch": 32}


def test_a_run_starts_with_as_many_as_the_cluster_holds() -> None:
    settings = {"workers": "1:4", "global-batch": 48}
    plan, four = placed(cluster(2, 2, 2), **settings)
    assert (plan.workers, plan.micro_batch) == ("1:4", 6)
    assert (four.world_size, four.micro_batch, four.accumulation) == (4, 6, 2)
    _, three = placed(cluster(2, 1), **settings)
    assert (three.world_size, three.micro_batch, three.accumulation) == (3, 4, 4)
    _, one = placed(cluster(1), **settings)
    assert (one.world_size, one.micro_batch, one.accumulation) == (1, 6, 8)
    assert {four.global_batch, three.global_batch, one.global_batch} == {48}


def test_too_small_a_cluster_is_refused() -> None:
    with pytest.raises(Problems, match=r"^workers: 2 workers need 2 cores; the cluster at head:6379 has 1$"):
        placed(cluster(1), **{"workers": "2:4", "global-batch": 48})


def test_all_sizes_that_cannot_share_the_batch_are_named() -> None:
    with pytest.raises(Problems) as refused:
        placed(cluster(8), workers="2:8")
    assert str(refused.value) == (
        "global-batch: 32 rows cannot be shared by 3, 5, 6 or 7 workers, and --workers 2:8 allows any number in "
        "between: use 840, or --workers 2, 4 or 8"
    )


def test_a_job_on_another_number_of_ranks_has_the_same_batch() -> None:
    plan, placement = placed(cluster(4), **{"workers": "1:4", "global-batch": 48})
    job = Job(plan, placement, 1, (1,), 10, 0, (), {}, Path(), Path(), Path())
    assert job.for_world_size(4) is job
    smaller = job.for_world_size(3)
    assert (smaller.placement.micro_batch, smaller.placement.accumulation) == (4, 4)
    assert smaller.for_world_size(4).placement == placement, "back again, it is as it was"
    with pytest.raises(LlmftError, match="there are 5 workers, and the plan has 1:4"):
        job.for_world_size(5)


def test_a_run_that_goes_on_keeps_its_micro_batch_where_it_fits() -> None:
    """Though a larger one would fit too; what is asked for is not bent."""
    catalog, there = Catalog(load_plugins()), cluster(8)
    found = {}
    for workers in (1, 2, 4, 8):
        plan = RunPlan.from_json({"strategy": "ddp", "workers": workers, "global-batch": 32})
        found[workers] = place(plan, there, catalog, 6)[1].micro_batch
    assert found == {1: 4, 2: 4, 4: 4, 8: 4}
    plan = RunPlan.from_json({"strategy": "ddp", "workers": 8, "global-batch": 32})
    assert place(plan, there, catalog, 2)[1].micro_batch == 2
    assert place(plan, there, catalog, 8)[1].micro_batch == 4
    with pytest.raises(Problems, match="8 rows do not divide a worker's share of 4"):
        placed(there, **{"workers": 8, "global-batch": 32, "micro-batch": 8})


class Narrow(Strategy):
    """It is at home on one rank and on three."""

    name, summary, options_type = "narrow", "narrow", Options

    def problems(self, placement: Placement) -> list[Problem]:
        return [] if placement.world_size in (1, 3) else [Problem("workers", f"narrow has no {placement.world_size}")]

    def engine(self, placement: Placement, rank: int) -> Any:
        raise NotImplementedError


class Extra:
    llmft_strategies = hookimpl(lambda self: [Narrow], specname="llmft_strategies")


def test_a_strategy_is_asked_for_every_size() -> None:
    plugins = load_plugins()
    plugins.manager.register(Extra(), name="test:narrow")
    plan = RunPlan.from_json({"strategy": "narrow", "workers": "1:3", "global-batch": 48})
    with pytest.raises(Problems, match=r"^workers: narrow has no 2$"):
        place(plan, cluster(4), Catalog(plugins))
