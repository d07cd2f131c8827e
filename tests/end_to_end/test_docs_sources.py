"""The examples of docs/data-sources.md: what they say is printed is printed. `…` stands for any text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmft_core.cli.main import main

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data-sources.md").read_text(encoding="utf-8")


def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    for name, content in re.findall(r"^```jsonl (\S+)\n(.*?)^```", DOCUMENT, flags=re.M | re.S):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")
    examples = re.findall(r"^```console\n\$ llmft (.*?)\n(.*?)^```", DOCUMENT, flags=re.M | re.S)
    assert examples
    for command, expected in examples:
        main(shlex.split(command))
        said = capsys.readouterr()
        wanted = "".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", expected))
        assert re.fullmatch(wanted, said.out + said.err), said.out + said.err
