"""URIs, paths and the backends they find."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, Problems
from llmft_core.loading import load_plugins
from llmft_core.storage import transfer
from llmft_core.storage.places import Places, checked_name

CATALOG = Catalog(load_plugins())


def places(choice: dict[str, Any] | None = None, **backends: dict[str, Any]) -> Places:
    return Places(CATALOG, choice, backends)


def test_a_uri_finds_its_backend_by_scheme(tmp_path: Path) -> None:
    found = places()
    assert found.place("s3://bucket/key/").path == "bucket/key"
    assert found.place("s3://bucket/key").uri == "s3://bucket/key"
    assert found.place("gs://bucket/a/b").backend.name == "gcs"
    assert found.place(f"file://{tmp_path}/x").uri == f"{tmp_path}/x"
    assert found.place(str(tmp_path)).backend is found.place("elsewhere").backend


def test_a_plain_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert places().place("data/../rows.jsonl").path == str(tmp_path / "rows.jsonl")


def test_options_come_from_the_runs_storage_or_from_backends() -> None:
    found = places({"name": "s3", "bucket": "b", "region": "eu-west-1"}, gcs={"project": "p"}, s3={"region": "no"})
    assert found.place("s3://other/x").backend.options.region == "eu-west-1"
    assert found.place("gs://other/x").backend.options.project == "p"
    assert found.place("./x").backend.options.root.endswith("/llmft-runs")


def test_runs_lie_below_the_root() -> None:
    assert places({"name": "s3", "bucket": "b", "prefix": "/team/me/"}).runs().uri == "s3://b/team/me/runs"
    with pytest.raises(Problems, match=r"storage\.bucket: is required"):
        places({"name": "s3"}).runs()
    with pytest.raises(InputError, match="--storage NAME"):
        places().runs()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://", "names no bucket"),
        ("s3://bucket/../other/key", "without `..`"),
        ("gs://bucket//key", "single slashes"),
        ("file://host/folder", "file:///FOLDER"),
        ("ftp://host/folder", "no storage backend reads ftp://"),
        ("gcs://bucket/key", "did you mean gs"),
        ("", "not a path"),
    ],
)
def test_a_wrong_uri_is_refused(uri: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        places().place(uri)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "..", ".", "/etc/passwd", "a/../../b", "a//b", "a/", "a\\b", "..\\b", "a\nb", "\0"]
)
def test_a_child_stays_below_its_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a relative path"):
        places().place(str(tmp_path)) / name


def test_a_child_may_lie_deeper(tmp_path: Path) -> None:
    child = places().place(str(tmp_path)) / "a/b..c/…"
    assert child.path == f"{tmp_path}/a/b..c/…"
    assert child.name == "…"
    assert checked_name("a/b") == "a/b"
    assert (places().place("/") / "x").path == "/x"


def test_a_place_travels_to_other_processes(tmp_path: Path) -> None:
    place = places().place(str(tmp_path)) / "x"
    transfer.write_bytes(place, b"1")
    assert transfer.read_bytes(pickle.loads(pickle.dumps(place))) == b"1"
