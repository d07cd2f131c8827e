"""LoRA through the real command, on Ray: an adapter, an answer from it, and the whole model that it becomes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from command import Answer, ask_without_llmft, llmft

from llmft_core.cli.main import main
from llmft_core.report import words

TINY = ("--dataset.rows", "64", "--dataset.test-rows", "16", "--global-batch", "8")
QUESTION = "<s><START_Q>How many?<END_Q><START_A>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path]:
    """What a run with dropout said that wrote a state and an adapter in its middle, and one at its end; its folder."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--workers", "2", "--strategy", "zero-3", "--max-steps", "4", "--name", "l", "--method", "lora")
    flags += ("--method.rank", "8", "--checkpoint.every-steps", "2", "--eval-every-steps", "2")
    flags += ("--method.dropout", "0.1", "--state.every-steps", "2")
    answer = llmft("run", *TINY, *flags, folder=folder)
    assert answer.code == 0, answer.err
    return answer, folder / "llmft-runs" / "runs" / "l"


def test_an_adapter_is_trained_asked_and_merged(trained: tuple[Answer, Path], tmp_path: Path) -> None:
    answer, run = trained
    adapter = run / "checkpoint_00001"
    assert "method lora: 60,160 trained (3.6 %), the model itself frozen" in answer.out
    assert f"llmft checkpoint merge {adapter} --out" in answer.out
    losses = [json.loads(row)["train/loss"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.3
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert manifest["tensors"]["trained"] == manifest["tensors"]["changed"] == 3 * 7 * 2 + 2
    assert manifest["files"]["adapter_model.safetensors"]["bytes"] < 4 * 60_160 + 20_000
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llama-2-tiny"

    merged = llmft("checkpoint", "merge", str(adapter), "--out", "whole/checkpoint_00000", folder=tmp_path)
    assert merged.code == 0, merged.err
    assert ask_without_llmft(tmp_path / "whole" / "checkpoint_00000").startswith(QUESTION)
    said = [
        llmft("generate", place, "How many?", "--max-new-tokens", "5", folder=tmp_path)
        for place in (str(adapter), "whole/checkpoint_00000")
    ]
    assert [one.code for one in said] == [0, 0], said
    assert said[0].out == said[1].out


def test_one_worker_goes_on_with_the_micro_batches_of_two(trained: tuple[Answer, Path], tmp_path: Path) -> None:
    """So it drops the same. Alone it would have chosen micro-batches of eight rows."""
    run = tmp_path / "store" / "runs" / "l"
    shutil.copytree(trained[1], run)
    flags = ("--storage.root", str(tmp_path / "store"), "--workers", "0", "--strategy", "ddp")
    answer = llmft("resume", str(run / "state_00000"), *flags, folder=tmp_path)
    assert answer.code == 0, answer.err
    assert "8 rows = 1 worker × 4 (micro-batch) × 2 (accumulation)" in answer.out
    assert "dropout" not in answer.out
    two, one = (
        [json.loads(row)["train/loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (trained[1], run)
    )
    assert one == pytest.approx(two, rel=1e-5)


def test_adapters_are_listed_shown_verified_and_pruned_as_models_are(
    trained: tuple[Answer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "l"
    shutil.copytree(trained[1], run)
    first, last = (run / f"checkpoint_{number:05d}" for number in (0, 1))

    def checkpoint(*args: str) -> tuple[int, str, str]:
        code = main(["checkpoint", *args])
        return code, *capsys.readouterr()

    code, out, _ = checkpoint("list", str(run), "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["uri"], row["complete"], row["step"]) for row in rows] == [(str(first), True, 2), (str(last), True, 4)]
    assert rows[0]["metrics"]["eval/loss"] > rows[1]["metrics"]["eval/loss"]
    sizes = [sum(file.stat().st_size for file in place.iterdir()) for place in (first, last)]
    assert [row["bytes"] for row in rows] == sizes

    code, out, _ = checkpoint("show", str(last))
    assert code == 0
    shown, manifest = yaml.safe_load(out), json.loads((last / "manifest.json").read_text())
    assert shown == {**manifest, "files": {name: file["bytes"] for name, file in manifest["files"].items()}}
    assert shown["provenance"]["plan"]["method"]["name"] == "lora"
    assert shown["tensors"] == {
        "count": 3 * 7 * 2 + 2,
        "trained": 3 * 7 * 2 + 2,
        "changed": 3 * 7 * 2 + 2,
        "unchanged": [],
        "not_in_base": [],
    }
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(shown["files"])

    code, out, _ = checkpoint("verify", str(last))
    assert (code, out) == (0, f"{last}: {words.size(sum(shown['files'].values()))} read, all as the manifest says\n")
    content = bytearray((last / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (last / "adapter_model.safetensors").write_bytes(content)
    code, _, err = checkpoint("verify", str(last))
    assert code == 1
    assert re.search(r"checkpoint_00001 is damaged: adapter_model\.safetensors: .*: do not serve it$", err.strip())

    code, out, _ = checkpoint("prune", str(run), "--keep-best", "1")
    assert code == 0
    lines = [line.split()[:2] for line in out.splitlines()]
    assert lines[1:3] == [["removed", str(first)], ["kept", str(last)]]
    assert out.splitlines()[-1] == f"{words.size(sizes[0])} freed"
    assert [place.name for place in run.glob("checkpoint_*")] == ["checkpoint_00001"]


def test_what_lora_cannot_do_is_said_together_before_training(tmp_path: Path) -> None:
    flags = ("--method.target-modules", "q_prj,v_proj", "--method.quantize", "nf4", "--context-length", "9999")
    answer = llmft("run", *TINY, "--workers", "0", "--method", "lora", *flags, folder=tmp_path)
    assert answer.code == 2
    assert [line.removeprefix("llmft: error: ") for line in answer.errors if "method." in line] == [
        "method.quantize: 4-bit weights need an NVIDIA GPU: leave out --method.quantize, or train on GPUs",
        "method.target-modules: no linear layer of LlamaForCausalLM is called q_prj; there are down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj",
    ]
    assert any("context-length: 9999 tokens" in line for line in answer.errors)
    assert not (tmp_path / "llmft-runs" / "runs").exists() or not list((tmp_path / "llmft-runs" / "runs").iterdir())
