"""What docs/data-formats.md shows is what happens."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmft_core.cli.dataset import run_command
from llmft_core.cli.flags import read_flags
from llmft_core.prepare import Material, prepare_data
from llmft_core.storage.places import Places

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data-formats.md"


@dataclass(frozen=True)
class Block:
    """A fenced block: language, what stands behind it, and its section and content."""

    language: str
    label: str
    section: str
    content: str


def blocks() -> list[Block]:
    found = []
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        for language, label, content in re.findall(
            r"^```(\w+) ?([^\n]*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL
        ):
            found.append(Block(language, label, section.partition("\n")[0], content))
    return found


def examples() -> list[Any]:
    """(files, command, the first row) of each, in the order of the page."""
    found: list[Any] = []
    files: dict[str, str] = {}
    command = section = ""
    for block in blocks():
        if block.section != section:
            section, files = block.section, {}
        if block.language in ("jsonl", "json") and block.label:
            files[block.label] = block.content
        if block.language == "sh":
            command = block.content.strip()
        if block.label == "row":
            found.append(pytest.param(dict(files), command, block.content.removesuffix("\n"), id=command))
    return found


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")


def prepared(command: str, folder: Path) -> Material:
    program, action, *flags = shlex.split(command)
    assert (program, action) == ("llmft", "run")
    given = read_flags(flags, {}, folder, "llmft run")
    return prepare_data(given.plan(), given.catalog, Places(given.catalog, None, {}), say=lambda text: None)


def shown(material: Material, row: int) -> str:
    """The row as the page shows it."""
    ids, labels = (array.tolist() for array in material.data.train.row(row))
    cuts = [index for index in range(1, len(ids)) if (labels[index] == -100) != (labels[index - 1] == -100)]
    text = ""
    for start, end in pairwise([0, *cuts, len(ids)]):
        before = material.tokenizer.decode(ids[:start])
        part = material.tokenizer.decode(ids[:end]).removeprefix(before)
        text += part if labels[start] == -100 else f"[{part}]"
    return text


@pytest.mark.parametrize(("files", "command", "row"), examples())
def test_an_example(
    files: dict[str, str], command: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    assert shown(prepared(command, tmp_path), 0) == row


def test_there_are_examples_of_every_format_that_reads_files() -> None:
    assert len(examples()) == 4
    assert {example.values[1].split()[3] for example in examples()} == {"chat-tags", "messages", "gsm8k"}


def test_the_example_of_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_label = {(block.section, block.label): block.content for block in blocks()}
    write(tmp_path, {"data/train.jsonl": by_label["gsm8k", "data/train.jsonl"]})
    monkeypatch.chdir(tmp_path)
    section = "From one to the other"
    command = shlex.split(by_label[section, "create"])
    assert run_command(command[2:], {}, tmp_path) == 0
    assert (tmp_path / "tagged/tokens.json").read_text() == by_label[section, "tagged/tokens.json"]


def test_json_on_the_page_is_json() -> None:
    parsed = [
        json.loads(line) for block in blocks() if block.language == "jsonl" for line in block.content.splitlines()
    ]
    parsed += [json.loads(block.content) for block in blocks() if block.language == "json"]
    assert len(parsed) == 8
