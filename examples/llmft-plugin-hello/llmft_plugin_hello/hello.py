"""A dataset format: someone says who they are, and the model answers with their greeting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from llmft_core import Conversation, DatasetFormat, Message, RowProblem, SourceOptions, Split, hookimpl

llmft_api = 1

GREETINGS = ("Hello", "Good morning", "Good evening", "Welcome", "Nice to meet you")
NAMES = ("Ada", "Blaise", "Carl", "Dorothy", "Emmy", "Fibonacci", "Grace", "Hypatia", "Ibn", "Johannes", "Kurt")


class HelloOptions(SourceOptions):
    """Options of the dataset; `source`, `train` and `test` are inherited from the core."""

    rows: int = Field(200, gt=0, description="training rows to make up where no source is given")
    test_rows: int = Field(20, ge=0, description="test rows to make up where no source is given")


class Hello(DatasetFormat):
    """Rows `{"name": "Ada", "greeting": "Hello"}`: read from a source, or made up where there is none."""

    name = "hello"
    summary = "greetings by name: made up, or read from rows with name and greeting"
    options_type = HelloOptions
    special_tokens = ("<HELLO_ME>", "<HELLO_YOU>", "<HELLO_END>")

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        """Two turns, of which the answer is trained."""
        for field in ("name", "greeting"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                return RowProblem(field, f"must be a text that is not empty, not {row.get(field)!r}")
        return Conversation(
            (
                Message("user", f"I am {row['name']}.", trained=False, opening="<HELLO_ME>", closing="<HELLO_END>"),
                Message(
                    "assistant",
                    f"{row['greeting']}, {row['name']}!",
                    trained=True,
                    opening="<HELLO_YOU>",
                    closing="<HELLO_END>",
                ),
            )
        )

    def generate(self, split: Split) -> Iterator[dict[str, Any]] | None:
        """The same rows each time; None where the user named a source."""
        if self.options.source or self.options.train or self.options.test:
            return None
        count = self.options.rows if split == "train" else self.options.test_rows
        offset = 0 if split == "train" else 3
        return (
            {"name": NAMES[(i + offset) % len(NAMES)], "greeting": GREETINGS[i % len(GREETINGS)]} for i in range(count)
        )


@hookimpl
def llmft_dataset_formats() -> list[type[DatasetFormat]]:
    """Greetings."""
    return [Hello]
