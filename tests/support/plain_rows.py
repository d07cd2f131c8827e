"""Rows that a format leaves as they are, for tests of where rows come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmft_core import Conversation, DatasetFormat, RowProblem, SourceOptions
from llmft_core.data.sources import SplitSource


class Plain(DatasetFormat):
    name = "plain"
    summary = "rows as they are"
    options_type = SourceOptions

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        return Conversation(())


class OnHub(Plain):
    hub_id = "openai/gsm8k"
    hub_files = {"train": "main/train-00000-of-00001.parquet", "test": "main/test-00000-of-00001.parquet"}  # noqa: RUF012


def rows_of(source: SplitSource) -> list[tuple[str, Any]]:
    """Each row with its origin."""
    return [(str(origin), row) for origin, row in source.rows(source.digest())]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)
