"""LoRA through the real command, on Ray: an adapter, an answer from it, and the whole model that it becomes."""

from __future__ import annotations

import json
from pathlib import Path

from command import ask_without_llmft, llmft

TINY = ("--dataset.rows", "64", "--dataset.test-rows", "16", "--global-batch", "16")
RUN = "llmft-runs/runs/l"
QUESTION = "<s><START_Q>How many?<END_Q><START_A>"


def test_an_adapter_is_trained_asked_and_merged(tmp_path: Path) -> None:
    flags = ("--workers", "2", "--strategy", "zero-3", "--max-steps", "4", "--name", "l")
    answer = llmft("run", *TINY, *flags, "--method", "lora", "--method.rank", "8", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert "method lora: 60,160 trained (3.6 %), the model itself frozen" in answer.out
    assert f"llmft checkpoint merge {tmp_path / RUN / 'checkpoint_00000'} --out" in answer.out
    losses = [json.loads(row)["train/loss"] for row in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.3
    adapter = tmp_path / RUN / "checkpoint_00000"
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert manifest["tensors"]["trained"] == manifest["tensors"]["changed"] == 3 * 7 * 2 + 2
    assert manifest["files"]["adapter_model.safetensors"]["bytes"] < 4 * 60_160 + 20_000
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llama-2-tiny"

    merged = llmft("checkpoint", "merge", f"{RUN}/checkpoint_00000", "--out", "whole/checkpoint_00000", folder=tmp_path)
    assert merged.code == 0, merged.err
    assert ask_without_llmft(tmp_path / "whole" / "checkpoint_00000").startswith(QUESTION)
    said = [
        llmft("generate", place, "How many?", "--max-new-tokens", "5", folder=tmp_path)
        for place in (f"{RUN}/checkpoint_00000", "whole/checkpoint_00000")
    ]
    assert [one.code for one in said] == [0, 0], said
    assert said[0].out == said[1].out


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
