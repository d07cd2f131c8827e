"""GSM8K: 8.5 thousand grade-school word problems with worked answers (Cobbe et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from llmft_core import DatasetFormat, Options, SourceOptions, Split, hookimpl
from llmft_plugins.datasets.question_answer import QuestionAnswer

llmft_api = 1

SPLITS: tuple[Split, ...] = ("train", "test")


class Gsm8kOptions(SourceOptions):
    """Where GSM8K lies, and which of its two versions is meant."""

    config: Literal["main", "socratic"] = Field(
        "main", description="answers as they are, or socratic: with a question before each step"
    )


class Gsm8k(QuestionAnswer):
    """From a folder or URI, or from the hub."""

    name: ClassVar[str] = "gsm8k"
    summary: ClassVar[str] = "grade-school word problems with worked answers (openai/gsm8k or your own copy)"
    options_type: ClassVar[type[Options]] = Gsm8kOptions
    hub_id: ClassVar[str] = "openai/gsm8k"

    def __init__(self, options: Gsm8kOptions) -> None:
        super().__init__(options)
        self.hub_files: Mapping[Split, str] = {
            split: f"{options.config}/{split}-00000-of-00001.parquet" for split in SPLITS
        }

    def may_hold_rows(self, file_name: str) -> bool:
        """OpenAI's own folder has train.jsonl and train_socratic.jsonl."""
        return ("socratic" in file_name) is bool(self.options.config == "socratic")


@hookimpl
def llmft_dataset_formats() -> list[type[DatasetFormat]]:
    return [Gsm8k]
