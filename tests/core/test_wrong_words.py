"""Input that no plan can be made of: each problem is named once, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmft_core.cli.main import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", ""], "model.name: '': "),
        (["--data.train-on", ""], "data.train-on: '': "),
        (["--plan", ""], "give --plan an existing YAML file"),
        (["--model.nmae", "x"], "--model.nmae: no such flag (did you mean model.name?)"),
        (["--storage.bucket", "b"], "storage.bucket: is an option of storage gcs and s3, but the plan chooses local"),
        (["--dataset", "gsm9k", "--dataset.source", "x"], "dataset: no dataset is called gsm9k (did you mean gsm8k?)"),
    ],
)
def test_flags(flags: list[str], said: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["plan", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("workers: true\n", "workers: True: true and false are no value for this option (from p.yaml)"),
        ("workers: 1\nlr: 1\nworkers: 2\n", "p.yaml:3: is not YAML: workers is given twice"),
        ("data:\n  on-long: drop\n  on-long: error\n", "p.yaml:3: is not YAML: on-long is given twice"),
    ],
)
def test_files(text: str, said: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "p.yaml").write_text(text)
    assert main(["plan", "--plan", "p.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_variable_of_a_plugin_that_is_not_chosen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFT_STORAGE_BUCKET", "b")
    assert main(["plan"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "LLMFT_STORAGE_BUCKET: is an option of storage gcs and s3, but the plan chooses local: unset it" in line


def test_a_command_about_a_checkpoint_does_not_mind_an_unfinished_plan(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "llmft.yaml").write_text("storage: {name: s3}\nlr: x\n")
    assert main(["checkpoint", "list", str(folder)]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err
    (folder / "llmft.yaml").write_text("storage: {name: s3, bukcet: b}\n")
    assert main(["checkpoint", "list", str(folder)]) == 2
    assert "bukcet: no such option (did you mean bucket?)" in capsys.readouterr().err
