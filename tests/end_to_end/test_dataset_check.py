"""`llmft dataset check`: what it says, how it ends, and that a run says the same before it starts anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmft_core.cli.main import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def row(number: int) -> str:
    return json.dumps({"question": f"How many is {number} and 1?", "answer": f"It is {number + 1}."}) + "\n"


def write(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")


BAD = '{"question": "Who?", "answer": "I}\n'
WHERE = ("--dataset", "gsm8k", "--dataset.train", "train.jsonl")
REASON = "is not valid JSON: this string has no closing quote (column 32)"


def check(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, list[str], list[str]]:
    code = main(["dataset", "check", *flags])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out.splitlines(), said.err.splitlines()


def test_good_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", "".join(map(row, range(10))))
    write("test.jsonl", row(10))
    code, out, err = check(capsys, *WHERE, "--dataset.test", "test.jsonl")
    assert (code, err) == (0, [])
    assert out[0] == " train  train.jsonl"
    assert out[1].startswith("        10 of 10 · ")
    assert " trained, longest " in out[1]
    assert out[2] == "  test  test.jsonl"
    assert out[4:] == ["ok: `llmft run` takes these rows"]
    assert not list(folder.glob("cache/quarantine/*"))


def test_bad_rows_end_with_2_after_the_account(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", "".join(map(row, range(10))) + BAD + row(3))
    code, out, err = check(capsys, *WHERE)
    assert code == 2
    assert out[1].startswith("        11 of 12; 1 set aside · ")
    assert out[2:] == ["warning: 1 row of train repeats another: train.jsonl:12 = train.jsonl:4"]
    (quarantine,) = folder.glob("cache/quarantine/*.jsonl")
    assert err == [
        "llmft: error: 1 of 12 rows cannot be used; mend or remove them, or set them aside with --data.on-bad-row "
        "quarantine:",
        f"llmft: error: train.jsonl:11: {REASON}",
        f"llmft: error: all of them, as they lie in their files: {quarantine}",
    ]
    assert json.loads(quarantine.read_text())["raw"] == BAD.rstrip("\n")


def test_set_aside_rows_end_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", "".join(map(row, range(10))) + BAD)
    allowed = ("--data.on-bad-row", "quarantine", "--data.max-bad-rows", "0.1", "--out", "mine")
    code, out, err = check(capsys, *WHERE, *allowed)
    assert (code, err) == (0, [])
    (quarantine,) = folder.glob("cache/quarantine/*.jsonl")
    assert out[2:] == [
        f"copied to mine/quarantine/{quarantine.name}",
        f"set aside: train.jsonl:11: {REASON}",
        f"set aside: all of them, as they lie in their files: {quarantine}",
        "ok: `llmft run` takes these rows",
    ]
    assert (folder / "mine" / "quarantine" / quarantine.name).read_bytes() == quarantine.read_bytes()


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", "".join(map(row, range(10))) + BAD)
    code, out, err = check(capsys, *WHERE, "--json")
    found = json.loads("\n".join(out))
    assert (code, err, found["ok"]) == (2, [], False)
    assert found["splits"]["train"]["rows"] == 10
    assert found["bad_rows"] == {
        "first": [{"origin": {"source": "train.jsonl", "line": 11}, "field": "", "reason": REASON}],
        "counts": {"is not valid JSON": 1},
        "total": 1,
    }
    assert found["problems"][1] == f"train.jsonl:11: {REASON}"
    assert Path(found["quarantine"]).is_file()
    missing = json.loads("\n".join(check(capsys, "--dataset", "gsm8k", "--dataset.train", "no.jsonl", "--json")[1]))
    assert missing["problems"] == ["dataset: --dataset.train: there is no file no.jsonl"]
    assert missing["ok"] is False


def test_long_rows_and_bad_rows_are_said_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", "".join(map(row, range(10))) + BAD + row(10**60))
    code, _, err = check(capsys, *WHERE, "--context-length", "40")
    assert code == 2
    assert err[1] == f"llmft: error: train.jsonl:11: {REASON}"
    assert err[-1].startswith(
        "llmft: error: 1 of 12 train rows (8.3%) are longer than --context-length 40 and would be"
    )


def test_without_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", "".join(map(row, range(10))) + BAD + row(3))
    code, out, err = check(capsys, *WHERE, "--model", "llama-2-7b")
    assert code == 2
    assert err[-1] == "llmft: error: `--no-tokenizer` checks what can be known of the rows without a model"
    code, out, err = check(capsys, *WHERE, "--model", "llama-2-7b", "--no-tokenizer")
    assert code == 2
    assert out == [
        " train  train.jsonl",
        "        11 of 12 rows can be parsed",
        "warning: 1 row of train repeats another: train.jsonl:12 = train.jsonl:4",
        "warning: not checked without a tokenizer: lengths, what is trained of each row, the format's tokens as ids",
    ]
    assert err[1] == f"llmft: error: train.jsonl:11: {REASON}"
    write("train.jsonl", row(1))
    code, out, err = check(capsys, *WHERE, "--no-tokenizer")
    assert (code, err, out[-1]) == (0, [], "ok: `llmft run` takes these rows")


def test_made_up_rows_need_no_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = check(capsys, "--dataset", "arithmetic", "--dataset.rows", "50")
    assert (code, err) == (0, [])
    assert out[0] == " train  arithmetic:train"


def test_neither_a_cluster_nor_weights_are_needed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", row(1))
    assert check(capsys, *WHERE)[0] == 0
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()


def test_a_run_says_the_same_before_it_starts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", "".join(map(row, range(40))) + BAD + row(3))
    _, _, checked = check(capsys, *WHERE)
    assert main(["plan", "--workers", "0", *WHERE]) == 2
    assert capsys.readouterr().err.splitlines() == checked
    allowed = ("--data.on-bad-row", "quarantine", "--data.max-bad-rows", "0.1")
    assert main(["plan", "--workers", "0", *WHERE, *allowed]) == 0
    said = capsys.readouterr().out
    (quarantine,) = folder.glob("cache/quarantine/*.jsonl")
    assert "  train rows  41 of 42; 1 set aside · " in said
    assert f"1 row cannot be used and is set aside: {quarantine}" in " ".join(said.split())
    assert "1 row of train repeats another: train.jsonl:42 = train.jsonl:4" in " ".join(said.split())


def test_a_mix_of_the_wrong_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", row(1))
    code, _, err = check(capsys, *WHERE, "--data.mix", "1,2")
    assert (code, err) == (
        2,
        [
            "llmft: error: dataset: --data.mix has 2 weights for the training sources train.jsonl: give one for each, "
            "in their order"
        ],
    )


def test_several_sources_by_flags_yaml_and_environment(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate("abc"):
        write(f"{name}.jsonl", row(number) + BAD)
    names = ["a.jsonl:2", "b.jsonl:2", "c.jsonl:2"]

    def bad(*flags: str) -> list[str]:
        found = json.loads("\n".join(check(capsys, "--dataset", "gsm8k", "--json", *flags)[1]))
        return [f"{one['origin']['source']}:{one['origin']['line']}" for one in found["bad_rows"]["first"]]

    assert bad("--dataset.train", "a.jsonl,b.jsonl", "--dataset.train", "c.jsonl") == names
    assert bad("--dataset.train", "?.jsonl", "--data.mix", "2") == names
    write("run.yaml", "dataset:\n  name: gsm8k\n  train: [a.jsonl, b.jsonl, c.jsonl]\ndata:\n  mix: [1, 0.5, 2]\n")
    assert bad("--plan", "run.yaml") == names
    monkeypatch.setenv("LLMFT_DATASET", "gsm8k")  # an option belongs to the plugin that its own layer chooses
    monkeypatch.setenv("LLMFT_DATASET_TRAIN", "a.jsonl,c.jsonl")
    assert bad() == [names[0], names[2]]
