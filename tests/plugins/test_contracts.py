"""Every plugin that is loaded keeps the contract of its kind: the built-ins use the suites that strangers use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmft_core import testing
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins

CATALOG = Catalog(load_plugins())
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "5", "weight": 0},
    {"role": "user", "content": "Sure?", "name": None},
    {"role": "assistant", "content": "Yes.", "weight": 1},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
    "chat-tags": [{"input": "<USER>2 + 3?<SEP>now</USER><SEP><ASSISTANT>5<SEP>five</ASSISTANT>"}],
    "messages": [{"messages": CHAT}, {"messages": CHAT[3:]}],
}
BROKEN: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "What?", "answer": " "}],
    "chat-tags": [{"input": text} for text in ("<USER>", "x", "<USER>a<ASSISTANT>b</USER>c</ASSISTANT>", "</USER>")],
    "messages": [{"messages": messages} for messages in ([], CHAT[:2], [CHAT[2], None], "x")],
}
TOKENS = b'{"tokens": ["<USER>", "</USER>", "<ASSISTANT>", "</ASSISTANT>", "<SEP>"], "single": ["<SEP>"]}'
COMPANIONS = {"chat-tags": {"tokens.json": TOKENS}}
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("storage", "s3"): {"bucket": "bucket"},
    ("storage", "gcs"): {"bucket": "bucket"},
}
REACHABLE = ("local",)  # the others need a server: tests/plugins/test_storage_backends.py brings them


def of_kind(kind: str) -> Any:
    """Parametrises a suite over the names of a kind."""
    return pytest.mark.parametrize("name", CATALOG.names(kind))


def make(kind: str, name: str, **options: Any) -> Any:
    """An extension of the catalogue."""
    return CATALOG.create(kind, {"name": name, **OPTIONS.get((kind, name), {}), **options})


def test_every_plugin_of_this_environment_is_loaded() -> None:
    assert [f"{record.id}: {record.cause}" for record in CATALOG.plugins.records if record.state != "loaded"] == []
    assert CATALOG.faults == {}


@of_kind("dataset")
class TestDatasetFormats(testing.DatasetFormatContract):
    @pytest.fixture
    def extension(self, name: str) -> Any:
        return make("dataset", name)

    @pytest.fixture
    def companions(self, name: str) -> dict[str, bytes]:
        return COMPANIONS.get(name, {})

    @pytest.fixture
    def rows(self, extension: Any, name: str) -> Any:
        return ROWS.get(name) or list(extension.generate("train"))[:20]

    @pytest.fixture
    def broken_rows(self, name: str) -> Any:
        return BROKEN.get(name, [])


@of_kind("storage")
class TestStorageBackends(testing.StorageBackendContract):
    @pytest.fixture
    def extension(self, name: str, tmp_path: Path) -> Any:
        self.reachable = name in REACHABLE
        return make("storage", name, **({"root": str(tmp_path)} if name == "local" else {}))


@of_kind("strategy")
class TestStrategies(testing.StrategyContract):
    @pytest.fixture
    def extension(self, name: str) -> Any:
        return make("strategy", name)


@of_kind("model")
class TestModelFamilies(testing.ModelFamilyContract):
    @pytest.fixture
    def extension(self, name: str) -> Any:
        return make("model", name)


@of_kind("method")
class TestMethods(testing.MethodContract):
    @pytest.fixture
    def extension(self, name: str) -> Any:
        return make("method", name)


@of_kind("tracker")
class TestTrackers(testing.TrackerContract):
    @pytest.fixture
    def extension(self, name: str) -> Any:
        return make("tracker", name)
