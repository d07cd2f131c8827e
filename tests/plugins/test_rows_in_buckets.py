"""Rows that lie in a bucket: shards, globs, compression, companions, and what is said where there is nothing."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from servers import S3Server

from llmft_core import Conversation, DatasetFormat, InputError, SourceOptions
from llmft_core.catalog import Catalog
from llmft_core.data.files import zstd_module
from llmft_core.data.sources import SplitSource, find_sources
from llmft_core.loading import load_plugins
from llmft_core.storage.places import Places
from llmft_core.storage.transfer import write_bytes


class Plain(DatasetFormat):
    name = "plain"
    summary = "rows as they are"
    options_type = SourceOptions

    def parse(self, row: object) -> Conversation:
        return Conversation(())


def numbers(source: SplitSource) -> list[tuple[str, object]]:
    rows = source.rows(source.digest())
    return [(str(origin).rpartition("/")[2], row["n"]) for origin, row in rows if isinstance(row, dict)]


def test_rows_in_a_bucket(moto_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    places = Places(Catalog(load_plugins()), None, {"s3": {"endpoint-url": moto_server.endpoint_url}})
    root = f"s3://{moto_server.bucket}/rows"
    parquet.write_table(pa.table({"n": [5, 6]}), tmp_path / "t.parquet")
    contents = {
        "train-1.jsonl.gz": gzip.compress(b'{"n": 1}\n\n{"n": 2}\n'),
        "train-2.jsonl.gz": gzip.compress(b'{"n": 3}\n'),
        "test.jsonl.zst": zstd_module().compress(b'{"n": 4}\n'),
        "deep/one.parquet": (tmp_path / "t.parquet").read_bytes(),
        "tokens.json": b"{}",
        "train-1.txt": b"no rows",
    }
    for name, content in contents.items():
        write_bytes(places.place(f"{root}/{name}"), content)

    def found(**options: str) -> dict[str, SplitSource]:
        return dict(find_sources(Plain(SourceOptions.model_validate(options)), places))

    sources = found(source=root)
    assert numbers(sources["train"]) == [
        ("train-1.jsonl.gz:1", 1), ("train-1.jsonl.gz:3", 2), ("train-2.jsonl.gz:1", 3)
    ]  # fmt: skip
    assert numbers(sources["test"]) == [("test.jsonl.zst:1", 4)]
    assert sources["train"].companion("tokens.json") == b"{}"
    assert sources["train"].companion("other.json") is None
    assert numbers(found(train=f"{root}/**/*.parquet")["train"]) == [("one.parquet:1", 5), ("one.parquet:2", 6)]
    both = found(train=f"{root}/train-2.jsonl.gz, {root}/t*1.jsonl.gz")["train"]
    assert [number for _, number in numbers(both)] == [3, 1, 2]
    for options, message in (
        ({"train": f"{root}/*"}, rf"^--dataset.train: {root}/\* matches {root}/tokens.json, which is no \.jsonl"),
        ({"train": f"{root}/x*"}, rf"^--dataset.train: no file matches {root}/x\*$"),
        ({"train": f"{root}/no.jsonl"}, rf"^--dataset.train: there is no file {root}/no.jsonl$"),
        ({"source": f"{root}/nowhere"}, rf"^--dataset.source: {root}/nowhere has no train.jsonl, no train"),
    ):
        with pytest.raises(InputError, match=message):
            found(**options)
