"""Which checkpoints are kept, and that only complete ones go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from servers import S3Server

from llmft_core.checkpoint.retention import Published, expendable, remove
from llmft_core.plan import CheckpointOptions


def place_of(folder: Path) -> Any:
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places

    return Places(Catalog(load_plugins()), None, {}).place(str(folder))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"keep-last": 2}, [3, 4]),
        ({"keep-last": 9}, [0, 1, 2, 3, 4]),
        ({"keep-best": 1}, [1, 4]),
        ({"keep-best": 2}, [1, 3, 4]),
        ({"keep-last": 2, "keep-best": 1}, [1, 3, 4]),
        ({"keep-best": 5}, [0, 1, 3, 4]),
        ({"keep-best": 1, "best-by": "train_loss"}, [4]),
    ],
)
def test_last_and_best_are_kept_and_always_the_newest(options: dict[str, Any], kept: list[int], tmp_path: Path) -> None:
    evaluated = [3.0, 1.0, None, 1.0, 2.0]  # the third was not evaluated; of equal ones the older is better
    published = [
        Published(place_of(tmp_path / str(i)), {"train/loss": 9.0 - i} | ({} if loss is None else {"eval/loss": loss}))
        for i, loss in enumerate(evaluated)
    ]
    gone = expendable(published, CheckpointOptions.model_validate(options))
    assert [i for i, one in enumerate(published) if one not in gone] == kept


def test_removal_takes_the_whole_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    for name in ("checkpoint_00000", "checkpoint_00001"):
        (tmp_path / name).mkdir()
        for file in ("model.safetensors", "manifest.json", ".is_checkpoint"):
            (tmp_path / name / file).write_text(name)
    remove(place_of(tmp_path / "checkpoint_00000"))
    assert not (tmp_path / "checkpoint_00000").exists()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    names = (".is_checkpoint", "manifest.json", "model.safetensors")
    assert left == [f"checkpoint_00001/{name}" for name in names]


def test_removal_from_a_bucket(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.storage.transfer import list_files, write_bytes

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    places = Places(Catalog(load_plugins()), None, {"s3": {"endpoint-url": s3_server.endpoint_url}})
    run = places.place("s3://bucket/retention")
    for name in ("checkpoint_00000", "checkpoint_00001"):
        for file in ("model.safetensors", "manifest.json", ".is_checkpoint"):
            write_bytes(run / name / file, b"x")
    remove(run / "checkpoint_00000")
    assert sorted(list_files(run)) == [
        f"checkpoint_00001/{name}" for name in (".is_checkpoint", "manifest.json", "model.safetensors")
    ]
