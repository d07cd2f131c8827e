"""The main job through the real command: every storage, every strategy with two workers, real data, a loaded model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from command import ask_without_llmft, llmft
from servers import GcsServer, S3Server

PINNED_LOSSES = [8.329382, 7.970957, 7.530479, 7.305301, 6.978105, 6.815786, 6.698738, 6.623096]  # nats a trained token
PINNED_EVALUATION = 6.633551
QUESTION = "<s><START_Q>How many?<END_Q><START_A>"
TINY = ("--dataset.rows", "64", "--dataset.test-rows", "16", "--global-batch", "16")


@pytest.fixture(scope="module")
def some_gsm8k(gsm8k_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the real GSM8K."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for name, rows in (("train.jsonl", 96), ("test.jsonl", 16)):
        lines = (gsm8k_folder / name).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(lines[:rows]))
    return folder


def check_checkpoint(folder: Path) -> dict:
    """Every file as the manifest says, the marker's hash right, loadable without llmft; returns the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, described in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert len(content) == described["bytes"], name
        assert hashlib.sha256(content).hexdigest() == described["sha256"], name
    marker = json.loads((folder / ".is_checkpoint").read_text())
    assert marker["manifest_sha256"] == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert set(manifest["files"]) >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    }
    assert manifest["tensors"]["changed"] > 0
    assert ask_without_llmft(folder).startswith(QUESTION)
    return manifest


def test_in_this_process_with_pinned_losses(tmp_path: Path) -> None:
    """A fixed tiny run: a changed number here is a changed data path, loss, schedule, optimizer or initialisation."""
    flags = (
        *TINY,
        "--workers",
        "0",
        "--epochs",
        "2",
        "--name",
        "pinned",
        "--tracker",
        "jsonl",
        "--tracker",
        "tensorboard",
    )
    answer = llmft("run", *flags, folder=tmp_path)
    assert answer.code == 0, answer.err
    run = tmp_path / "llmft-runs" / "runs" / "pinned"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows]
    assert losses == pytest.approx(PINNED_LOSSES, abs=2e-4)
    assert rows[-1]["eval/loss"] == pytest.approx(PINNED_EVALUATION, abs=2e-4)
    assert {path.name for path in run.iterdir()} >= {"plan.json", "checkpoint_00000", "checkpoint_00001"}
    assert list((run / "tensorboard").iterdir())
    manifest = check_checkpoint(run / "checkpoint_00001")
    assert manifest["metrics"]["eval/loss"] == pytest.approx(PINNED_EVALUATION, abs=2e-4)
    assert manifest["provenance"]["plan"]["name"] == "pinned"
    assert "llmft generate" in answer.out
    assert answer.err == ""

    asked = llmft("generate", str(run / "checkpoint_00001"), "How many?", "--max-new-tokens", "4", folder=tmp_path)
    assert asked.code == 0, asked.err
    assert asked.out.strip()


def test_two_workers_on_ray_give_the_same_losses(tmp_path: Path) -> None:
    """ddp, local storage, the embedded default with fewer rows: and the same curve as without Ray."""
    answer = llmft("run", *TINY, "--workers", "2", "--epochs", "2", "--name", "two", folder=tmp_path)
    assert answer.code == 0, answer.err
    run = tmp_path / "llmft-runs" / "runs" / "two"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows] == pytest.approx(PINNED_LOSSES, abs=5e-4)
    assert "RANDOM TINY" in answer.out
    assert "last checkpoint:" in answer.out
    assert answer.err == ""
    check_checkpoint(run / "checkpoint_00001")


def test_zero_3_on_real_rows_and_the_real_tokenizer_to_s3(
    some_gsm8k: Path, llama2_tokenizer_model: Path, s3_server: S3Server, tmp_path: Path
) -> None:
    flags = ("--dataset", "gsm8k", "--dataset.source", str(some_gsm8k), "--model", "llama-2-tiny")
    tokenizer = ("--model.tokenizer", str(llama2_tokenizer_model))
    strategy = ("--strategy", "zero-3", "--workers", "2", "--max-steps", "2", "--global-batch", "16", "--name", "z3")
    where = ("--storage", "s3", "--storage.bucket", s3_server.bucket, "--storage.endpoint-url", s3_server.endpoint_url)
    environment = s3_server.environment
    answer = llmft(
        "run",
        *flags,
        *tokenizer,
        *strategy,
        *where,
        "--storage.prefix",
        "team",
        folder=tmp_path,
        environment=environment,
    )
    assert answer.code == 0, answer.err
    assert not (tmp_path / "llmft-runs").exists()
    assert s3_server.folder is not None
    stored = s3_server.folder / "team" / "runs" / "z3"
    manifest = check_checkpoint(stored / "checkpoint_00000")
    assert "tokenizer.model" in manifest["files"]
    assert s3_server.secret_key not in "".join(
        path.read_text(errors="replace") for path in stored.rglob("*.json*") if path.is_file()
    )
    uri = "s3://bucket/team/runs/z3/checkpoint_00000"
    reach = ("--backends.s3.endpoint-url", s3_server.endpoint_url, "--max-new-tokens", "3")
    asked = llmft("generate", *reach, uri, "How many?", folder=tmp_path, environment=environment)
    assert asked.code == 0, asked.err
    again = llmft(
        "run", *flags, *where, "--storage.prefix", "team", "--name", "z3", folder=tmp_path, environment=environment
    )
    assert again.code == 2
    assert "exists already" in again.err


def test_zero_2_in_bf16_to_gcs(gcs_server: GcsServer, tmp_path: Path) -> None:
    where = (
        "--storage",
        "gcs",
        "--storage.bucket",
        gcs_server.bucket,
        "--storage.endpoint-url",
        gcs_server.endpoint_url,
    )
    flags = ("--strategy", "zero-2", "--workers", "2", "--max-steps", "2", "--precision", "bf16", "--name", "g")
    answer = llmft("run", *TINY, *flags, *where, "--storage.anonymous", folder=tmp_path)
    assert answer.code == 0, answer.err
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    import gcsfs

    fs = gcsfs.GCSFileSystem(token="anon", project="p", endpoint_url=gcs_server.endpoint_url)
    for path in fs.find(f"{gcs_server.bucket}/runs/g/checkpoint_00000"):
        fs.get_file(path, str(fetched / Path(path).name))
    manifest = check_checkpoint(fetched)
    assert manifest["provenance"]["plan"]["checkpoint"]["dtype"] == "auto"
    assert "bfloat16" in ask_without_llmft(fetched)


def test_a_smoke_test_is_one_step_one_evaluation_and_a_full_checkpoint(tmp_path: Path) -> None:
    answer = llmft("run", *TINY, "--workers", "0", "--smoke-test", "--name", "smoke", folder=tmp_path)
    assert answer.code == 0, answer.err
    run = tmp_path / "llmft-runs" / "runs" / "smoke"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1
    assert "eval/loss" in rows[0]
    check_checkpoint(run / "checkpoint_00000")


def test_any_model_folder_and_a_plan_file(tmp_path: Path) -> None:
    """`auto`: a folder that is no Llama, options from YAML, validation rows held out."""
    first = llmft("run", *TINY, "--workers", "0", "--smoke-test", "--name", "first", folder=tmp_path)
    assert first.code == 0, first.err
    model = tmp_path / "model"
    shutil.copytree(tmp_path / "llmft-runs" / "runs" / "first" / "checkpoint_00000", model)
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=4200, n_embd=32, n_layer=2, n_head=2, n_positions=256, tie_word_embeddings=True)
    for stale in ("model.safetensors", "config.json", "generation_config.json", "manifest.json", ".is_checkpoint"):
        (model / stale).unlink()
    GPT2LMHeadModel(config).save_pretrained(model)
    rows = [
        {"question": f"How many is {n} and 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"}
        for n in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        "dataset: {name: gsm8k, train: train.jsonl}\nmodel: ./model\nworkers: 0\nmax-steps: 2\nglobal-batch: 8\n"
        "context-length: 128\nlr: 0.001\nname: gpt\ndata: {validation-fraction: 0.2}\n"
    )
    answer = llmft("run", "--plan", "run.yaml", "--precision", "fp32", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert "(auto)" in answer.out
    check_checkpoint(tmp_path / "llmft-runs" / "runs" / "gpt" / "checkpoint_00000")
