"""Whatever is wrong is one line, exit code 2, before a worker starts, and nothing is written under the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from servers import S3Server

from llmft_core.cli.main import main

GOOD_ROW = json.dumps({"question": "How many is 1 and 1?", "answer": "It is 2.\n#### 2"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def errors(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """The error lines of `llmft run --workers 0 FLAGS`."""
    code = main(["run", *(() if "--workers" in flags else ("--workers", "0")), *flags])
    captured = capsys.readouterr()
    assert code == 2, captured.out + captured.err
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert lines
    assert all(line.startswith("llmft: error: ") for line in lines), captured.err
    assert not list(Path().glob("llmft-runs/runs/*"))
    return [line.removeprefix("llmft: error: ") for line in lines]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--dataset", "gms8k"], "dataset: no dataset is called gms8k (did you mean gsm8k?)"),
        (["--model", "llama-2-7B"], "model: no model is called llama-2-7B (did you mean llama-2-7b?)"),
        (["--storage", "s4"], "storage: no storage is called s4"),
        (["--epohcs", "3"], "--epohcs: no such flag (did you mean epochs?)"),
        (["--storage.bucket", "b"], "--storage.bucket: is an option of storage gcs and s3, but the plan chooses local"),
        (["--storage", "s3"], "storage.bucket: is required"),
        (["--dataset", "gsm8k", "--dataset.source", "nowhere"], "nowhere"),
        (
            ["--global-batch", "33", "--workers", "2"],
            "global-batch: 33 rows cannot be shared by 2 workers: use 32 or 34",
        ),
        (["--global-batch", "32", "--micro-batch", "5"], "micro-batch: 5 rows do not divide a worker's share of 32"),
        (["--context-length", "4096"], "context-length: 4096 tokens; llama-2-tiny has 2048 positions"),
        (["--precision", "fp16"], "precision: fp16"),
        (["--precision", "fp16", "--strategy", "zero-2"], "precision: fp16"),
        (["--gpus-per-worker", "1"], "gpus-per-worker: there is no GPU here"),
        (["--data.train-on", "teacher"], "teacher"),
        (["--model", "./nowhere"], "nowhere"),
        (["--schedule", "cosin"], "(did you mean cosine?)"),
        (["--lr", "inf"], "lr: 'inf': input should be a finite number"),
        (["--disable-plugin", "jsnol"], "disable-plugin: no plugin is called jsnol (did you mean jsonl?)"),
        (["--cluster", "127.0.0.1:1", "--workers", "1"], "cluster: 127.0.0.1:1 does not answer"),
    ],
)
def test_one_line_says_what_is_wrong(
    flags: list[str], wanted: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = errors(capsys, *flags)
    assert len(found) == 1, found
    assert wanted in found[0]


def test_rows_that_do_not_fit_are_said_of_each_split(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = errors(capsys, "--context-length", "64")
    splits = [re.search(r"rows? .*longer than --context-length 64 and would be dropped", line) for line in found]
    assert len(found) == 2, found
    assert all(splits), found
    assert " train rows" in found[0]
    assert " test rows" in found[1]


def test_all_problems_of_plan_environment_and_flags_come_together(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "llmft.yaml").write_text("epchs: 3\nlr: fast\n")
    monkeypatch.setenv("LLMFT_WORKRS", "2")
    found = "\n".join(errors(capsys, "--storage", "s3", "--global-batch", "-1", "--nonsense"))
    for wanted in (
        "epchs: no such option (did you mean epochs?)",
        "lr: 'fast'",
        "(from llmft.yaml)",
        "LLMFT_WORKRS: this variable sets nothing (did you mean LLMFT_WORKERS?)",
        "storage.bucket: is required",
        "global-batch: '-1'",
        "--nonsense: no such flag",
    ):
        assert wanted in found


def test_problems_that_only_a_look_finds_come_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "blocked").write_text("a file where the storage root should be")
    flags = ("--storage.root", "blocked", "--dataset", "gsm8k", "--dataset.source", "nowhere", "--micro-batch", "5")
    found = "\n".join(errors(capsys, *flags))
    assert "storage" in found
    assert "nowhere" in found
    assert "micro-batch: 5" in found


def test_a_malformed_row_is_named_by_file_and_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train.jsonl").write_text(
        f'{GOOD_ROW}\n{{"question": "Who?", "answer": "I\n{GOOD_ROW[:-1]}, "hint": 1}}\n'
    )
    found = errors(capsys, "--dataset", "gsm8k", "--dataset.train", "train.jsonl")
    assert any("train.jsonl:2" in line and "JSON" in line for line in found), found
    assert any("train.jsonl:3: hint" in line for line in found), found


def test_a_wrong_type_in_yaml_is_named_with_its_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text("dataset: 3\n")
    (found,) = errors(capsys, "--plan", "run.yaml")
    assert "dataset: 3" in found
    assert "(from run.yaml)" in found


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu"]) == 2
    assert capsys.readouterr().err.startswith("llmft: error: no command is called rnu (did you mean run?)")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--debug", "--lr", "-1"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "llmft: error: lr: '-1'" in said


def test_an_empty_split_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train.jsonl").write_text("\n")
    (found,) = errors(capsys, "--dataset", "gsm8k", "--dataset.train", "train.jsonl")
    assert "train.jsonl has no rows" in found


def test_the_hub_out_of_reach_says_how_to_give_a_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = errors(capsys, "--dataset", "gsm8k")
    assert "--dataset.source" in found


def test_a_run_name_that_exists_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "elsewhere" / "runs" / "mine").mkdir(parents=True)
    (folder / "elsewhere" / "runs" / "mine" / "plan.json").write_text("{}")
    (found,) = errors(capsys, "--storage.root", "elsewhere", "--name", "mine")
    assert "mine exists already" in found


def test_buckets_and_credentials(
    folder: Path, capsys: pytest.CaptureFixture[str], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--storage", "s3", "--storage.endpoint-url", s3_server.endpoint_url, "--storage.bucket")
    (none,) = errors(capsys, *where, "bucket")
    assert "credentials" in none
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    (missing,) = errors(capsys, *where, "nobody")
    assert "no bucket nobody" in missing
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    (refused,) = errors(capsys, *where, "bucket")
    assert "does not accept the access key" in refused


def test_a_tracker_without_a_login(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together with what else is wrong, instead of an hour later."""
    monkeypatch.delenv("WANDB_MODE")
    found = errors(capsys, "--tracker", "wandb", "--context-length", "4096")
    assert [line.partition(":")[0] for line in found] == ["tracker", "context-length"]
    assert "set WANDB_API_KEY, run `wandb login`, or choose `mode: offline`" in found[0]
