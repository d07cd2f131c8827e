"""Checkpoints in storage through `llmft checkpoint`: complete ones are read and checked, others are named as such."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from servers import S3Server
from toy_tokenizers import save_toy_tokenizer

from llmft_core.checkpoint.export import Exported
from llmft_core.checkpoint.publish import publish
from llmft_core.cli.main import main


def made(folder: Path) -> tuple[Path, Exported]:
    """A folder as `export` leaves it, with one small tensor."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    save_toy_tokenizer(folder)
    return folder, Exported({"model.norm.weight": (4,)}, "F32", 1, 1, (), ())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage root with one complete and one incomplete checkpoint."""
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places

    monkeypatch.chdir(tmp_path)
    run = Places(Catalog(load_plugins()), None, {}).place(str(tmp_path / "store" / "runs" / "r"))
    metrics = {"train/loss": 2.5, "eval/loss": 2.25}
    publish(*_swapped(made(tmp_path / "a"), run / "checkpoint_00000"), {"step": 7, "metrics": metrics})
    publish(*_swapped(made(tmp_path / "b"), run / "checkpoint_00001"), {"step": 9, "metrics": {}})
    (tmp_path / "store" / "runs" / "r" / "checkpoint_00001" / ".is_checkpoint").unlink()
    return tmp_path / "store"


def _swapped(one: tuple[Path, Exported], place: object) -> tuple:
    return one[0], place, one[1]


def checkpoint(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["checkpoint", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_list_tells_complete_from_incomplete(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = checkpoint(capsys, "list", str(root))
    assert code == 0
    first, second = out.splitlines()[1:]
    assert "checkpoint_00000" in first
    assert " complete" in first
    assert "2.5000" in first
    assert "checkpoint_00001" in second
    assert "INCOMPLETE" in second
    code, out, _ = checkpoint(capsys, "list", str(root / "runs" / "r"), "--json")
    assert [row["complete"] for row in json.loads(out)] == [True, False]


def test_what_lacks_its_marker_is_never_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    incomplete = str(root / "runs" / "r" / "checkpoint_00001")
    for action in (["show", incomplete], ["verify", incomplete], ["pull", incomplete, "new"]):
        code, _, err = checkpoint(capsys, *action)
        assert code == 2
        assert "is not a complete checkpoint" in err
    assert not Path("new").exists()
    assert main(["generate", incomplete, "How many?"]) == 2


def test_pull_gives_the_same_bytes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = root / "runs" / "r" / "checkpoint_00000"
    code, out, err = checkpoint(capsys, "pull", str(stored), "new")
    assert (code, err) == (0, "")
    assert "verified" in out
    assert {path.name: path.read_bytes() for path in Path("new").iterdir()} == {
        path.name: path.read_bytes() for path in stored.iterdir()
    }
    assert checkpoint(capsys, "pull", str(stored), "new")[0] == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_damage_is_found(damage: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = root / "runs" / "r" / "checkpoint_00000"
    assert checkpoint(capsys, "verify", str(stored))[0] == 0
    weights = stored / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "missing":
        weights.unlink()
    else:
        manifest = stored / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"step": 7', '"step": 8'))
    code, _, err = checkpoint(capsys, "verify", str(stored))
    assert code == 1
    assert ("manifest.json" if damage == "manifest" else "model.safetensors") in err
    assert checkpoint(capsys, "pull", str(stored), "new")[0] in (1, 2)
    assert not Path("new").exists()
    assert not list(Path().glob(".new.*"))


def test_a_checkpoint_in_a_bucket(
    tmp_path: Path, s3_server: S3Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places

    monkeypatch.chdir(tmp_path)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    backends = {"s3": {"endpoint-url": s3_server.endpoint_url}}
    place = Places(Catalog(load_plugins()), None, backends).place("s3://bucket/stored/runs/r/checkpoint_00000")
    publish(*_swapped(made(tmp_path / "a"), place), {"step": 1, "metrics": {}})
    reach = ("--backends.s3.endpoint-url", s3_server.endpoint_url)
    code, out, err = checkpoint(capsys, "list", *reach, "s3://bucket/stored")
    assert (code, err) == (0, "")
    assert "s3://bucket/stored/runs/r/checkpoint_00000  complete" in out
    assert checkpoint(capsys, "verify", *reach, place.uri)[0] == 0
    assert checkpoint(capsys, "pull", *reach, place.uri, "new")[0] == 0
    assert (tmp_path / "new" / ".is_checkpoint").is_file()


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ([], "no action is given; there are list, show, verify, pull"),
        (["lst", "x"], "no action is called lst"),
        (["verify"], "needs a folder or URI"),
        (["pull", "x"], "pull needs a new folder"),
        (["list", "empty"], "holds no checkpoints"),
    ],
)
def test_wrong_words(args: list[str], wanted: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = checkpoint(capsys, *args)
    assert code == 2
    assert wanted in err
    assert len(err.splitlines()) == 1
