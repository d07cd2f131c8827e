"""The examples of docs/data-view.md print what they are said to print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmft_core.cli.main import main

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "data-view.md"
EXAMPLES = re.findall(r"^```\n\$ llmft (.*)\n([^`]*)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_an_example_prints_this(
    command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(shlex.split(command)) == 0
    assert output in capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3
