"""A run's name belongs to one run, also where two ask for it at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import S3Server

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError
from llmft_core.loading import load_plugins
from llmft_core.run import claim
from llmft_core.storage.places import Place, Places
from llmft_core.storage.transfer import read_bytes

RUNS = 4


def race(target: Place) -> list[str]:
    """What several runs that ask at once are told, and last what lies there then."""

    def one(number: int) -> str:
        try:
            claim(target, b"plan %d" % number)
        except InputError as error:
            return str(error)
        return f"plan {number}"

    with ThreadPoolExecutor(RUNS) as pool:
        said = list(pool.map(one, range(RUNS)))
    return [*said, read_bytes(target / "plan.json").decode()]


def is_won_by_one(told: list[str]) -> bool:
    """Whether one got the name, and its plan lies there; the others know."""
    *said, there = told
    lost = [text for text in said if "was taken by another run in this moment: choose another --name" in text]
    return said.count(there) == 1 and len(lost) == RUNS - 1


def test_in_a_folder(tmp_path: Path) -> None:
    assert is_won_by_one(race(Places(Catalog(load_plugins()), None, {}).place(str(tmp_path / "runs" / "x"))))


def test_in_a_store_with_conditional_writes(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto keeps S3's promise; rclone ignores If-None-Match, and there preflight's look is all there is."""
    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    options = {"s3": {"endpoint-url": moto_server.endpoint_url}}
    places = Places(Catalog(load_plugins()), None, options)
    assert is_won_by_one(race(places.place(f"s3://{moto_server.bucket}/claimed/runs/x")))
