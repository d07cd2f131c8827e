"""A dataset folder and a cache for tests of what becomes of rows, and rows of a question and an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from toy_tokenizers import TAGS, byte_level_tokenizer

from llmft_core import (
    Conversation,
    DatasetFormat,
    Message,
    RowProblem,
    SourceOptions,
)
from llmft_core.data.prepare import PreparedData, prepare
from llmft_core.data.sources import find_sources
from llmft_core.plan import RunPlan


class Pairs(DatasetFormat):
    name = "pairs"
    summary = "a question and an answer"
    options_type = SourceOptions
    special_tokens = tuple(TAGS)

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        for field in ("q", "a"):
            if not isinstance(row.get(field), str):
                return RowProblem(field, "is missing or no text")
        return Conversation(
            (
                Message("user", row["q"], False, "<START_Q>", "<END_Q>"),
                Message("assistant", row["a"], True, "<START_A>", "<END_A>"),
            )
        )


@cache
def _tokenizer() -> Any:
    return byte_level_tokenizer()


class Bench:
    """A dataset folder, a cache, and a tokenizer with the tags of `Pairs`."""

    def __init__(self, folder: Path) -> None:
        self.source, self.cache, self.tokenizer = folder / "source", folder / "cache", _tokenizer()
        self.source.mkdir(exist_ok=True)

    def write(self, split: str, rows: list[Any]) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.source / f"{split}.jsonl").write_text("\n".join(lines) + "\n" if lines else "", encoding="utf-8")

    def prepare(self, fingerprint: str = "print", dataset: DatasetFormat | None = None, **plan: Any) -> PreparedData:
        options = {name.replace("_", "-"): value for name, value in plan.items()}
        dataset = dataset or Pairs(SourceOptions.model_validate({"source": str(self.source)}))
        valid = RunPlan.model_validate(options)
        sources = find_sources(dataset, None, valid.data.mix)
        return prepare(dataset, sources, valid, self.tokenizer, fingerprint, self.cache)

    def folders(self) -> set[str]:
        data = self.cache / "data"
        return {path.name for path in data.iterdir() if path.is_dir()} if data.exists() else set()


def pairs(count: int, longest: int = 8) -> list[dict[str, str]]:
    return [{"q": f"{number}+1", "a": "x" * (1 + number % longest)} for number in range(count)]


def long_rows(count: int, long: list[int]) -> list[dict[str, str]]:
    return [{"q": "1", "a": "x+" * (100 if number in long else 1)} for number in range(count)]
