"""What a machine lacks for a plan's plugins is said with all else that is wrong, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmft_core import Device, Options, Placement, Problem, Problems, Strategy, hookimpl
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.plan_layers import Layer, resolve
from llmft_core.prepare import make_ready
from llmft_core.sizes import staged_bytes
from llmft_core.train.cluster import Cluster, Node
from llmft_core.train.method import Share
from llmft_core.values import ModelSize


class Picky(Strategy):
    """It needs what is nowhere."""

    name, summary, options_type = "picky", "picky", Options

    def node_problems(self, device: Device) -> list[Problem]:
        return [Problem("strategy", f"picky needs a {device} of gold")]

    def engine(self, placement: Placement, rank: int) -> Any:
        raise NotImplementedError


class Extra:
    llmft_strategies = hookimpl(lambda self: [Picky], specname="llmft_strategies")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_this_machine_is_refused_together_with_the_rest(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plugins = load_plugins()
    plugins.manager.register(Extra(), name="test:picky")
    catalog = Catalog(plugins)
    layer = {"strategy": "picky", "workers": workers, "context-length": 9999, "dataset": {"rows": 8, "test-rows": 8}}
    plan = resolve([Layer("flags", layer)], catalog)
    with pytest.raises(Problems) as refused:
        make_ready(plan, catalog, debug=False, say=lambda text: None)
    said = [str(problem) for problem in refused.value.problems]
    assert said[0] == "strategy: picky needs a cpu of gold"
    assert said[1].startswith("context-length: 9999 tokens")
    assert list(tmp_path.rglob("plan.json")) == []


@pytest.mark.parametrize(
    ("gpus", "state", "needed"),
    [
        ((8,), {}, 2 * 14 + 84),
        ((8, 8), {}, 2 * 14 + 42),  # bytes a parameter: two checkpoints in bf16, and half of masters and moments
        ((8, 8), {"every-minutes": 0, "every-steps": 100}, 2 * 14 + 42),
        ((8, 8), {"every-minutes": 0}, 2 * 14),
    ],
)
def test_a_nodes_cache_has_room_for_its_part_of_a_state_too(
    gpus: tuple[int, ...], state: dict[str, int], needed: int
) -> None:
    plan = RunPlan.from_json({"precision": "bf16", "state": state})
    cluster = Cluster("", tuple(Node(str(number), "host", 96, count) for number, count in enumerate(gpus)))
    size, share = ModelSize(7 * 10**9, 0), Share(7 * 10**9, adapter=False)
    placement = Placement(sum(gpus), "cuda", "bf16", 1, 1, 1.0)
    assert staged_bytes(plan, size, share, cluster, placement) == needed * 10**9
