"""`llmft plugins`: the list, the description, and the words for types and defaults."""

from __future__ import annotations

import argparse
import enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from pydantic.fields import FieldInfo

from llmft_core import InputError, Options
from llmft_core.cli import plugins
from llmft_core.cli.describe import aligned, default_text, type_name


def llmft(*argv: str) -> int:
    """The command as main.py wires it."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--disable-plugin", action="append", default=[])
    parser = argparse.ArgumentParser("llmft")
    plugins.add_parser(parser.add_subparsers(), common)
    args = parser.parse_args(argv)
    return int(args.command(args))


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "int"),
        (str, "str"),
        (float, "float"),
        (bool, "true or false"),
        (Path, "path"),
        (Literal["a", "b"], "one of a, b"),
        (Color, "one of red, blue"),
        (int | None, "int"),
        (int | str, "int or str"),
        (Annotated[int, Field(gt=0)] | None, "int"),
        (list[str], "list of str"),
        (tuple[int, ...], "list of int"),
        (dict[str, Any], "mapping"),
        (Any, "any value"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert type_name(annotation) == words


def test_every_type_of_the_plan_has_plain_words() -> None:
    from llmft_core.options import leaves
    from llmft_core.plan import RunPlan

    for path, field in leaves(RunPlan):
        words = type_name(field.annotation)
        assert not {"[", "typing.", "Annotated"} & {words, *words}, (path, words)


class Several(Options):
    required: int = Field(description="d")
    none: int | None = Field(None, description="d")
    empty: str = Field("", description="d")
    yes: bool = Field(True, description="d")
    color: Color = Field(Color.RED, description="d")
    made: list[str] = Field(default_factory=lambda: ["a"], description="d")
    rate: float = Field(1e-5, description="d")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("required", "required"),
        ("none", "none"),
        ("empty", '""'),
        ("yes", "true"),
        ("color", "red"),
        ("made", '["a"]'),
        ("rate", "1e-05"),
    ],
)
def test_defaults_in_words(name: str, words: str) -> None:
    field: FieldInfo = Several.model_fields[name]
    assert default_text(field) == words


def test_columns_are_aligned_and_nothing_is_cut() -> None:
    long = "x" * 500
    assert list(aligned([["A", "B"], ["abc", long], ["", "y"]])) == ["A    B", f"abc  {long}", "     y"]


def test_the_list_goes_to_a_pipe_without_decoration(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmft("plugins") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["KIND", "NAME", "DISTRIBUTION", "VERSION", "STATE"]
    assert ["method", "full", "llmft", "0.1.0", "loaded"] in [line.split() for line in lines]
    assert not set("│┃━─\x1b") & set("".join(lines))
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_disabled_plugin_is_listed_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    llmft("plugins", "--disable-plugin", "jsonl", "--disable-plugin", "llmft:full")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["-", "jsonl", "llmft", "0.1.0", "disabled"] in rows
    assert ["-", "full", "llmft", "0.1.0", "disabled"] in rows


def test_one_plugin_is_described_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmft("plugins", "arithmetic") == 0
    text = capsys.readouterr().out
    assert text.startswith("dataset arithmetic: ")
    assert "from llmft 0.1.0 (plugin llmft:arithmetic, loaded)" in text
    assert "choose with --dataset arithmetic" in text
    (line,) = [line for line in text.splitlines() if "--dataset.seed" in line]
    assert line.split()[:3] == ["--dataset.seed", "int", "0"]


def test_a_models_short_name_leads_to_its_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmft("plugins", "llama-2-tiny") == 0
    assert "model llama2: " in capsys.readouterr().out


def test_an_unknown_name_is_an_error_with_a_way_out() -> None:
    with pytest.raises(InputError, match=r"^no plugin is called arithmetik \(did you mean arithmetic\?\); there are "):
        llmft("plugins", "arithmetik")
