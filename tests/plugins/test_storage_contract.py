"""The storage contract on real servers, and files that only one of many may create."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3_transfers import place_at
from servers import S3Server
from transfers import CATALOG

from llmft_core import InputError
from llmft_core.storage import transfer
from llmft_core.storage.places import Places
from llmft_core.testing import StorageBackendContract


def test_one_of_many_creates(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    for place in (
        place_at(moto_server.endpoint_url, "lease", "create"),
        Places(CATALOG, None, {}).place(str(tmp_path)) / "x",
    ):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda number, place=place: transfer.create(place, b"%d" % number), range(8)))
        assert won.count(True) == 1
        assert transfer.read_bytes(place) == b"%d" % won.index(True)


def test_who_cannot_create_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Places(CATALOG, None, {}).place(str(tmp_path)) / "x"
    monkeypatch.setattr(type(place.backend), "creates_exclusively", False)
    with pytest.raises(InputError, match="storage local cannot create a file only where none is there"):
        transfer.create(place, b"")


@pytest.mark.parametrize("server", ["rclone", "moto", "gcs"])
class TestContract(StorageBackendContract):
    """The suite that strangers use."""

    @pytest.fixture
    def extension(self, server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
        running = request.getfixturevalue({"rclone": "s3_server", "moto": "moto_server", "gcs": "gcs_server"}[server])
        options = {"bucket": running.bucket, "endpoint-url": running.endpoint_url, "prefix": "contract"}
        if server == "gcs":
            return CATALOG.create("storage", {"name": "gcs", "anonymous": True, **options})
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        return CATALOG.create("storage", {"name": "s3", **options})
