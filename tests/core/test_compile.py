"""`--compile`: the same losses, names and bytes on the way, exact resume, few graphs, and no silent way around it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ask_without_llmft, llmft
from compiling import errors_of_the_compiler, train_all
from ranks import on_ranks
from resuming import TOTAL, VOCABULARY, Case, train_on
from tables import tiny_llama
from training import Recorder, isolation

from llmft_core.train.watchdog import PATIENCE_SECONDS, Watchdog

TOLERANCES = {"fp32": 1e-5, "bf16": 2e-3}
"""Of a loss, relative: a compiled block rounds less often, for it keeps fp32 between the operations that it joins."""
LORA = {"name": "lora", "rank": 4, "dropout": 0.2}
PACKED = {"data": {"packing": "best-fit"}}
RECOMPUTING = {"gradient-checkpointing": True}
SAID = re.compile(r"2 blocks share (\d+) graphs, compiled in \d+ s")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), VOCABULARY)


def graphs_ahead(answer: dict[str, Any]) -> int:
    """How many were made before the first step; nothing else was said, so there was none later."""
    first, second = answer["said"]
    assert first == "compiling the model's blocks"
    found = SAID.fullmatch(second)
    assert found is not None, second
    return int(found[1])


Compared = tuple[str, str, Any, dict[str, Any], int]
"""Strategy, precision, method, settings, and the graphs: for training and for evaluations, with a mask and without; and
of blocks whose input needs a gradient or does not, as of LoRA's first one."""
FEW: list[Compared] = [("ddp", "fp32", "full", PACKED, 4), ("zero-2", "bf16", "full", {}, 2)]
MANY: list[Compared] = [
    ("ddp", "bf16", LORA, PACKED, 6),
    ("ddp", "bf16", "full", RECOMPUTING, 3),
    ("zero-2", "fp32", LORA, {**PACKED, **RECOMPUTING}, 6),
    ("zero-2", "bf16", LORA, {}, 3),
]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "compared", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
)
def test_losses_are_those_of_runs_that_are_not_compiled(compared: list[Compared], world_size: int, base: Path) -> None:
    cases = [
        (strategy, precision, compiled, method, settings, (2, 2), True)
        for strategy, precision, method, settings, _ in compared
        for compiled in (False, True)
    ]
    ranks = on_ranks(world_size, train_all, str(base), world_size, cases)
    for number, (_, precision, _, _, graphs) in enumerate(compared):
        eager, compiled = ranks[0][2 * number : 2 * number + 2]
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=TOLERANCES[precision])
        assert compiled["eval"] == pytest.approx(eager["eval"], rel=TOLERANCES[precision])
        assert len(set(compiled["loss"])) == 5
        assert graphs_ahead(compiled) == graphs
        for of_rank in ranks:
            assert of_rank[2 * number + 1]["shapes"] == eager["shapes"]
            assert of_rank[2 * number + 1]["graphs"] == graphs
            assert of_rank[2 * number + 1]["breaks"] == {}


@pytest.mark.slow
def test_dropout_belongs_to_the_micro_batch(base: Path) -> None:
    """Whatever rank computes it, and also where it is computed again in the backward pass."""
    cases = [("ddp", "fp32", True, LORA, settings, (2, 4)) for settings in ({}, RECOMPUTING)]
    cases.append(("ddp", "fp32", False, LORA, {}, (2, 4)))
    once, again, eager = on_ranks(1, train_all, str(base), 1, cases)[0]
    two = on_ranks(2, train_all, str(base), 2, [("ddp", "fp32", True, LORA, {}, (2, 2))])[0][0]
    assert again["loss"] == pytest.approx(once["loss"], rel=1e-5)
    assert again["norm"] == pytest.approx(once["norm"], rel=1e-4)
    assert two["loss"] == pytest.approx(once["loss"], rel=1e-5)
    assert eager["loss"] != pytest.approx(once["loss"], rel=1e-4), "it draws other numbers"


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "precision", "method"), [("ddp", "fp32", LORA), ("zero-2", "bf16", "full")])
def test_a_resumed_run_is_the_same_bit_for_bit(
    strategy: str, precision: str, method: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes that have compiled nothing yet, and whose first batch is another one."""
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))

    def run(step: int) -> list[dict[str, Any]]:
        case = Case(strategy, precision, str(base), 2, str(tmp_path / "run"), step, method=method, compiled=True)
        return [answers[0] for answers in on_ranks(2, train_on, [case])]

    straight, resumed = run(0), run(TOTAL // 2)
    for answers in (straight, resumed):
        assert "compiling the model's blocks" in answers[0]["phases"]
    for one, other in zip(straight, resumed, strict=True):
        assert one["fragments"].keys() == other["fragments"].keys() != set()
        for key, values in one["fragments"].items():
            assert np.array_equal(values, other["fragments"][key]), key
    assert resumed[0]["loss"] == straight[0]["loss"][TOTAL // 2 :]
    assert len(set(straight[0]["loss"])) == TOTAL


def test_samples_that_see_each_other_are_found_in_compiled_blocks_too(tmp_path: Path) -> None:
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    (answer,) = on_ranks(1, isolation, "ddp", {"bloom": str(tmp_path)}, True)
    assert answer["bloom"].startswith("BloomForCausalLM lets packed samples see each other")


def test_nothing_goes_on_without_a_graph_in_silence() -> None:
    (found,) = on_ranks(1, errors_of_the_compiler)
    assert found["nameless"] == (
        "Model does not name its repeated blocks (_no_split_modules), which is what --compile compiles: leave it out"
    )
    assert found["values"].startswith("torch.compile failed (Unsupported: Data-dependent branching")
    assert found["many"].startswith("torch.compile failed (FailOnRecompileLimitHit: Dynamo recompile limit exceeded")
    for text in (found["values"], found["many"]):
        assert text.endswith("leave out --compile; a run that has a state may go on without it")
        assert "\n" not in text


def test_a_compiler_is_given_time() -> None:
    watchdog = Watchdog(60, 0, Recorder())
    watchdog.compiling()
    watchdog.at(1, "the forward pass of micro-batch 0")  # the others may not be there yet
    assert watchdog.limit == PATIENCE_SECONDS
    watchdog.met()
    assert watchdog.limit == 60


FLAGS = ("--workers", "0", "--dataset.rows", "16", "--dataset.test-rows", "8", "--global-batch", "4", "--compile")


def test_what_cannot_be_compiled_is_refused_before_anything_starts(tmp_path: Path) -> None:
    flags = (*FLAGS, "--strategy", "zero-3", "--context-length", "100000")
    answer = llmft("run", *flags, folder=tmp_path, environment={"CXX": "no-such-compiler"})
    assert answer.code == 2
    assert answer.errors == [
        "llmft: error: compile: zero-3 gathers weights within each block, where a compiled block does not wait for "
        "them: use --strategy ddp or zero-2, or leave out --compile",
        "llmft: error: compile: no-such-compiler is not in PATH, with which torch.compile builds kernels: apt-get "
        "install g++, or leave out --compile",
        "llmft: error: context-length: 100000 tokens; llama-2-tiny has 2048 positions: use fewer",
    ]
    assert not (tmp_path / "llmft-runs").exists() or not list((tmp_path / "llmft-runs").rglob("plan.json"))


def test_nodes_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmft_core.plan import RunPlan
    from llmft_core.preflight import compiler_problems, node_problems

    assert compiler_problems("cpu") == []
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plan = RunPlan.from_json({"compile": True, "strategy": "ddp", "gpus-per-worker": 1}).to_json()
    assert [problem.partition(",")[0] for problem in node_problems(plan, "", 0)] == [
        "compile: triton cannot be imported",
        "compile: no C compiler is in PATH",
    ]
    plan["compile"] = False
    assert node_problems(plan, "", 0) == []


def test_a_whole_run(tmp_path: Path) -> None:
    """The checkpoint is an ordinary one, and the compiler's files are where PyTorch's user wants them."""
    (tmp_path / "tmp").mkdir()
    places = {"TMPDIR": str(tmp_path / "tmp"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    compiled = llmft("run", *FLAGS, "--smoke-test", "--name", "x", folder=tmp_path, environment=places)
    assert compiled.code == 0, compiled.err
    assert "… compiling the model's blocks\n" in compiled.out
    assert re.search(r"… 3 blocks share 2 graphs, compiled in \d+ s\n", compiled.out)
    assert "compiled again" not in compiled.out
    plain = llmft("run", *FLAGS[:-1], "--smoke-test", "--name", "y", folder=tmp_path, environment=places)
    assert plain.code == 0, plain.err
    folders = [tmp_path / "llmft-runs" / "runs" / name / "checkpoint_00000" for name in "xy"]
    headers = []
    for folder in folders:
        with (folder / "model.safetensors").open("rb") as file:
            headers.append(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
    assert headers[0] == headers[1]
    assert {path.name for path in folders[0].iterdir()} == {path.name for path in folders[1].iterdir()}
    assert ask_without_llmft(folders[0])
