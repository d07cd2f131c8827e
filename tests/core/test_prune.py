"""`llmft checkpoint prune`: the rules of a run, applied to what lies in storage; incomplete ones only when asked."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from servers import S3Server

from llmft_core.cli.main import main


def lay(folder: Path, number: int, eval_loss: float | None, *, complete: bool = True) -> None:
    """A checkpoint of one small file."""
    place = folder / f"checkpoint_{number:05d}"
    place.mkdir(parents=True)
    (place / "weights").write_bytes(b"w")
    files = {"weights": {"bytes": 1, "sha256": hashlib.sha256(b"w").hexdigest()}}
    metrics = {"train/loss": 10.0 - number} | ({} if eval_loss is None else {"eval/loss": eval_loss})
    text = json.dumps({"files": files, "metrics": metrics})
    (place / "manifest.json").write_text(text)
    if complete:
        marker = {"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
        (place / ".is_checkpoint").write_text(json.dumps(marker))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with four complete checkpoints, of which the second is the best, and an old and a young incomplete one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "r"
    for number, loss in enumerate([3.0, 1.0, None, 2.0]):
        lay(folder, number, loss)
    for number in (4, 5):
        lay(folder, number, None, complete=False)
    long_ago = time.time() - 7200
    for path in (folder / "checkpoint_00004").iterdir():
        os.utime(path, (long_ago, long_ago))
    (folder / "metrics.jsonl").write_text("{}")
    return folder


def left(run: Path) -> list[int]:
    return sorted(int(path.name[-1]) for path in run.glob("checkpoint_*"))


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        (["--keep-last", "2"], [2, 3, 4, 5]),
        (["--keep-last", "1", "--keep-best", "1"], [1, 3, 4, 5]),
        (["--keep-best", "1", "--best-by", "train_loss"], [3, 4, 5]),
        (["--keep-last", "9"], [0, 1, 2, 3, 4, 5]),
        (["--keep-last", "1", "--incomplete"], [3, 5]),
        (["--keep-last", "1", "--incomplete", "--dry-run"], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_stays(flags: list[str], numbers: list[int], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "prune", str(run), *flags]) == 0
    out = capsys.readouterr().out
    assert left(run) == numbers
    gone = "would remove" if "--dry-run" in flags else "removed"
    removed = [line for line in out.splitlines() if line.startswith(gone)]
    assert len(removed) == (4 if "--dry-run" in flags else 6 - len(numbers))
    assert [line for line in out.splitlines() if line.startswith("left") and "checkpoint_00005" in line]
    assert (run / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["runs/r"], "prune needs --keep-last N or --keep-best N"),
        (["runs/r", "--keep-last", "0"], "prune needs --keep-last N or --keep-best N"),
        (["runs/r", "--keep-last", "-1"], "give a number from 1 on"),
        (["runs/r", "--keep-last", "x"], "invalid int value"),
        (["runs/r", "--keep-best", "1", "--best-by", "luck"], "give eval_loss or train_loss"),
        (["runs", "--keep-last", "1"], "is not a run's folder"),
        (["nothing", "--keep-last", "1"], "holds no checkpoints"),
        (["runs/r", "new", "--keep-last", "1"], "pull needs a new folder"),
    ],
)
def test_wrong_words(args: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "prune", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert left(run) == [0, 1, 2, 3, 4, 5]


def test_a_damaged_manifest_stops_it_before_anything_goes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoint_00001" / "manifest.json").write_text("{}")
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1"]) == 1
    assert "manifest.json" in capsys.readouterr().err
    assert left(run) == [0, 1, 2, 3, 4, 5]


def test_in_a_bucket_young_incomplete_ones_stay(
    moto_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.storage.transfer import list_files, upload_many

    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    lay(tmp_path / "r", 0, 1.0)
    lay(tmp_path / "r", 1, 2.0)
    lay(tmp_path / "r", 2, None, complete=False)
    place = Places(Catalog(load_plugins()), None, {"s3": {"endpoint-url": moto_server.endpoint_url}}).place(
        "s3://bucket/prune/r"
    )
    paths = [path for path in (tmp_path / "r").rglob("*") if path.is_file()]
    upload_many([(path, place / str(path.relative_to(tmp_path / "r"))) for path in paths])
    reach = ["--backends.s3.endpoint-url", moto_server.endpoint_url]
    assert main(["checkpoint", "prune", place.uri, *reach, "--keep-last", "1", "--incomplete"]) == 0
    assert "a run may be writing it" in capsys.readouterr().out
    assert {name.split("/")[0] for name in list_files(place)} == {"checkpoint_00001", "checkpoint_00002"}
