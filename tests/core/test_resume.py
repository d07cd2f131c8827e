"""Where a run goes on: what is complete, what may change, and what is said where dropout draws other numbers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmft_core.catalog import Catalog
from llmft_core.checkpoint.state import Progress
from llmft_core.checkpoint.stored_state import StoredState
from llmft_core.errors import Problems
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.resume import Point, changes, check_inputs, finished, once_abandoned, other_numbers
from llmft_core.storage.places import Place, Places
from llmft_core.train.job import Job
from llmft_core.train.method import has_dropout
from llmft_core.values import Placement

SETTINGS = {"workers": 4, "global-batch": 32, "micro-batch": 8, "gpus-per-worker": 0, "name": "x"}
SAME = {"data": {"content": "content"}, "model": "model", "tokenizer": "tokenizer"}


def lay(folder: Path, marker: str, manifest: dict[str, Any]) -> None:
    """A complete checkpoint or state of one small file."""
    folder.mkdir(parents=True)
    progress = json.dumps({"step": manifest["step"], "counters": {}}).encode()
    (folder / "progress.json").write_bytes(progress)
    files = {"progress.json": {"bytes": len(progress), "sha256": hashlib.sha256(progress).hexdigest()}}
    text = json.dumps({"files": files, **manifest})
    (folder / "manifest.json").write_text(text)
    (folder / marker).write_text(json.dumps({"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.fixture
def run(tmp_path: Path) -> Place:
    """The folder of a run, without a state."""
    return Places(Catalog(load_plugins()), None, {}).place(str(tmp_path / "runs" / "x"))


def point_in(run: Place, *, world_size: int = 4, **changed: Any) -> Point:
    """After the second of eight steps, of a plan with what was changed."""
    plan = RunPlan.from_json({**SETTINGS, **changed}).to_json()
    manifest = {"provenance": {"plan": plan}, "world_size": world_size}
    state = StoredState(run / "state_00000", manifest, Progress(2, {}))
    return Point(run, {"plan": plan, "total_steps": 8, **SAME}, state)


def test_a_run_with_the_checkpoint_of_its_last_step_is_complete(run: Place) -> None:
    """For so many steps, and unless a state is named."""
    point = point_in(run)
    lay(Path(run.path) / "checkpoint_00000", ".is_checkpoint", {"step": 7})
    assert finished(point, 8) == ""
    check_inputs(point, SAME, 8)
    lay(Path(run.path) / "checkpoint_00001", ".is_checkpoint", {"step": 8})
    assert finished(point, 8) == (run / "checkpoint_00001").uri
    with pytest.raises(Problems, match="max-steps: the run has done 8 of 8 optimizer steps: give more, or name"):
        check_inputs(point, SAME, 8)
    assert finished(point, 12) == ""
    check_inputs(point, SAME, 12)
    named = replace(point, named=True)
    assert finished(named, 8) == ""
    check_inputs(named, SAME, 8)


def test_a_state_that_became_complete_meanwhile_is_the_one_to_go_on_from(run: Place) -> None:
    point = point_in(run)
    lay(Path(run.path) / "state_00001", ".is_state", {"step": 4})
    assert once_abandoned(point, pytest.fail).step == 4
    assert once_abandoned(replace(point, named=True), pytest.fail).step == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"data": {"engine": "ray", "processes": 3, "rehash": True, "max-dropped": 0.5, "max-bad-rows": 0.5}},
        {"strategy": {"name": "zero-3", "offload-optimizer": "cpu"}, "micro-batch": 2, "eval-micro-batch": 1},
        {"weights": {"share": True, "mirror": "m"}, "step-timeout": 1, "eval-every-steps": 3},
    ],
)
def test_what_is_not_in_the_mathematics_of_a_step_may_change(changed: dict[str, Any]) -> None:
    before = RunPlan.from_json(SETTINGS).to_json()
    assert changes(before, RunPlan.from_json({**SETTINGS, **changed}).to_json()) == []


def test_what_lies_beside_it_may_not() -> None:
    before = RunPlan.from_json(SETTINGS).to_json()
    other = {"packing": "best-fit", "on-long": "truncate", "processes": 2, "validation-fraction": 0.5}
    assert changes(before, RunPlan.from_json({**SETTINGS, "data": other}).to_json()) == [
        'data.on-long: "drop", now "truncate"',
        'data.packing: "none", now "best-fit"',
        "data.validation-fraction: 0.0, now 0.5",
    ]


def job_with(micro_batch: int, *, dropout: bool = True, **changed: Any) -> Job:
    plan = RunPlan.from_json({**SETTINGS, **changed})
    return Job(
        plan, Placement(8, "cpu", "fp32", micro_batch, 1, 1.0), 8, (8,), 9, 0, (), {}, *(Path(),) * 3, dropout=dropout
    )


def test_it_is_said_where_dropout_draws_other_numbers(run: Place) -> None:
    after = ": dropout draws other numbers from here on, so losses will not be those of the run as it was"
    point = point_in(run)
    assert other_numbers(point, job_with(8)) == ""
    assert other_numbers(point, job_with(4)) == f"micro-batches have 4 rows instead of 8{after}"
    assert other_numbers(point, job_with(4, dropout=False)) == ""
    assert other_numbers(replace(point, state=None), job_with(4)) == "", "it begins anew"
    shrunk = point_in(run, world_size=16)  # there a worker's share was two rows
    assert other_numbers(shrunk, job_with(2)) == ""
    assert other_numbers(shrunk, job_with(8)).startswith("micro-batches have 8 rows instead of 2: ")
    both = other_numbers(point, job_with(8, compile=True, **{"gpus-per-worker": 1}))
    assert both == f"GPUs do not draw as CPUs do and compiled blocks do not draw as others do{after}"


@pytest.mark.parametrize(
    ("method", "config", "expected"),
    [
        ({"name": "full"}, {"attention_dropout": 0.0, "dropped": True}, False),
        ({"name": "full"}, {"resid_pdrop": 0.1}, True),
        ({"name": "full"}, {"hidden_dropout": 0.1, "text_config": {"attention_dropout": 0}}, False),
        ({"name": "lora"}, {"attention_dropout": 0.0}, False),
        ({"name": "lora", "dropout": 0.1}, {}, True),
    ],
)
def test_dropout_is_the_models_or_the_methods(method: dict[str, Any], config: dict[str, Any], expected: bool) -> None:
    assert has_dropout(Catalog(load_plugins()).create("method", method), config) == expected
