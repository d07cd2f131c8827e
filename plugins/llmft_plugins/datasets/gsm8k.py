"""GSM8K: 8.5 thousand grade-school word problems with worked answers (Cobbe et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from llmft_core import DatasetFormat, Options, SourceOptions, Split, hookimpl
from llmft_plugins.datasets.question_answer import QuestionAnswer

llmft_api = 1


class Gsm8k(QuestionAnswer):
    """From a folder or URI with train.jsonl and test.jsonl, or from the hub."""

    name: ClassVar[str] = "gsm8k"
    summary: ClassVar[str] = "grade-school word problems with worked answers (openai/gsm8k or your own copy)"
    options_type: ClassVar[type[Options]] = SourceOptions
    hub_id: ClassVar[str] = "openai/gsm8k"
    hub_files: ClassVar[Mapping[Split, str]] = {
        "train": "main/train-00000-of-00001.parquet",
        "test": "main/test-00000-of-00001.parquet",
    }


@hookimpl
def llmft_dataset_formats() -> list[type[DatasetFormat]]:
    return [Gsm8k]
