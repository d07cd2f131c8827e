"""What a machine lacks for a plan's plugins is said with all else that is wrong, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmft_core import Device, Options, Placement, Problem, Problems, Strategy, hookimpl
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.plan_layers import Layer, resolve
from llmft_core.prepare import make_ready


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
