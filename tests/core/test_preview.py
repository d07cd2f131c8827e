"""Rows as the model sees them: what each token writes, which are trained, and that no row can break the view."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tables import ListTable, random_table
from toy_tokenizers import byte_level_tokenizer, metaspace_tokenizer, save_toy_tokenizer

from llmft_core import InputError, Origin
from llmft_core.cli.main import main
from llmft_core.data.batches import Form, arrange, collate
from llmft_core.data.order import Order
from llmft_core.data.preview import Speller, batch_view, find_row, picked_rows, row_view
from llmft_core.data.tables import TokenTable
from llmft_core.plan import RunPlan
from llmft_core.report.rows_html import rows_page
from llmft_core.report.rows_text import print_rows
from llmft_core.report.visible import visible
from llmft_core.views import BatchView, Piece, RowView, Run

BYTE_LEVEL, METASPACE, LEGACY = byte_level_tokenizer(), metaspace_tokenizer(), metaspace_tokenizer(legacy=True)
HOSTILE = '<script>alert(1)</script> & "q" \'\u202eevil\x1b[31m\t\r\n<END_Q> · ⟦'


# --- what each token writes ---------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE, LEGACY], ids=["bytes", "metaspace", "legacy"])
def test_the_tokens_write_what_the_decoder_writes(tokenizer: Any, text: str) -> None:
    ids = [tokenizer.eos_token_id, *tokenizer(f"{text}<END_Q>{text}", add_special_tokens=False)["input_ids"]]
    texts = list(Speller(tokenizer).texts(ids))
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def test_a_character_of_several_tokens_is_written_by_the_last() -> None:
    ids = METASPACE("é数😀", add_special_tokens=False)["input_ids"]
    assert METASPACE.convert_ids_to_tokens(ids) == ["▁", "é", "<0xE6>", "<0x95>", "<0xB0>", "😀"]
    assert list(Speller(METASPACE).texts(ids)) == [" ", "é", "", "", "数", "😀"]


def test_bytes_that_never_become_a_character_write_nothing() -> None:
    first, second = METASPACE.convert_tokens_to_ids(["<0xE8>", "<0xAA>"])
    end = METASPACE.convert_tokens_to_ids("<END_Q>")
    assert list(Speller(METASPACE).texts([first, end, second])) == ["", "<END_Q>", ""]


def test_a_tokenizer_without_a_decoder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_toy_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = "<unk>"
    assert list(Speller(tokenizer).texts([1, 2, 0])) == [" how", " many", "<unk>"]


# --- rows of a table ----------------------------------------------------------------------------------------------


COUNTS = ((2, 1), (5, 1), (3, 2), (5, 3))


def named(table: TokenTable, source: str, lines: list[int]) -> TokenTable:
    """The table, with names for its rows."""
    table.sources, table.lines = (source,), np.array(lines, dtype=np.int32)
    return table


@pytest.fixture
def table() -> TokenTable:
    """Rows of 2, 5, 3 and 5 tokens, of which 1, 1, 2 and 3 are trained, from lines 1, 2, 4 and 7."""
    rows = [(list(range(length)), [-100] * (length - trained) + [1] * trained) for length, trained in COUNTS]
    return named(ListTable(rows), "data/train.jsonl", [1, 2, 4, 7])


FILES = ("data/train.jsonl", "more/train.jsonl", "data/other.jsonl")


def test_which_rows_are_picked(table: TokenTable) -> None:
    assert picked_rows(table, "first", 2, 0) == [0, 1]
    assert picked_rows(table, "longest", 3, 0) == [1, 3, 2]
    assert picked_rows(table, "shortest", 9, 0) == [0, 2, 1, 3]
    assert picked_rows(table, "least-trained", 2, 0) == [1, 0]
    assert sorted(picked_rows(table, "random", 4, 1)) == [0, 1, 2, 3]
    assert picked_rows(table, "random", 2, 1) == picked_rows(table, "random", 4, 1)[:2]


def test_a_first_token_is_never_trained() -> None:
    row = row_view(named(ListTable([([5, 6], [5, 6])]), "t", [1]), 0, Speller(BYTE_LEVEL))
    assert row.origin == "t:1"
    assert [piece.trained for piece in row.pieces] == [False, True]
    assert row.trained_tokens == 1


@pytest.mark.parametrize("wanted", ["3", "train.jsonl:4", "data/train.jsonl:4"])
def test_a_row_is_found(table: TokenTable, wanted: str) -> None:
    assert find_row(table, wanted, FILES, ()) == 2


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("0", "--row 0: there are rows 1 to 4"),
        ("5", "--row 5: there are rows 1 to 4"),
        ("train.jsonl", "--row train.jsonl: give FILE:LINE, or the number of a row, 1 to 4"),
        (":3", "--row :3: give FILE:LINE, or the number of a row, 1 to 4"),
        (
            "ain.jsonl:4",
            "--row ain.jsonl:4: no rows come from ain.jsonl; they come from data/train.jsonl and more/train.jsonl "
            "and 1 more",
        ),
        (
            "train.jsonl:5",
            "--row train.jsonl:5: no row came from that line: it is empty, beyond the end, or was left out; the "
            "nearest is data/train.jsonl:4",
        ),
        (
            "other.jsonl:4",
            "--row other.jsonl:4: no row came from that line: it is empty, beyond the end, or was left out",
        ),
        (
            "train.jsonl:6",
            "--row train.jsonl:6: is longer than the context and was dropped: raise --context-length",
        ),
    ],
)
def test_a_row_that_is_not_there(table: TokenTable, wanted: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        find_row(table, wanted, FILES, ("data/train.jsonl:6",))
    assert str(caught.value) == said


class TwoFiles(ListTable):
    """Every row is line 4 of a file of its own."""

    def origin(self, index: int) -> Origin:
        return Origin(FILES[index], 4)


def test_a_name_of_two_files_is_not_guessed() -> None:
    table = TwoFiles([([1, 2], [1, 2])] * 2)
    table.lines = np.array([4, 4], dtype=np.int32)
    assert find_row(table, "more/train.jsonl:4", FILES, ()) == 1
    with pytest.raises(InputError, match=r"is data/train.jsonl:4 and more/train.jsonl:4: give more of the path"):
        find_row(table, "train.jsonl:4", FILES, ())


@pytest.mark.parametrize("packing", ["none", "best-fit"])
def test_the_layout_is_that_of_the_batch(packing: str) -> None:
    table: Any = random_table(40, 50, 30)
    table.origin = lambda row: f"t:{row + 1}"
    plan = RunPlan.from_json({"seed": 3, "global-batch": 8, "context-length": 64, "data": {"packing": packing}})
    order = Order.of(table, plan)
    view = batch_view(table, order, plan, 4)
    in_step = order.epoch(0).step(0, 8)
    numbers = arrange(table, in_step, 4)[0]
    batch = collate(table, in_step, numbers, 0, Form.of(plan, pad_id=0))
    bounds = in_step.bounds
    samples = [in_step.samples[bounds[number] : bounds[number + 1]].tolist() for number in numbers]
    assert [label for label, _ in view.rows] == [" + ".join(f"t:{row + 1}" for row in found) for found in samples]
    assert view.width == batch.input_ids.shape[1]
    for number, (_, runs) in enumerate(view.rows):
        assert sum(run.tokens for run in runs) == view.width
        assert sum(run.tokens for run in runs if run.kind == "trained") == (batch.labels[number] != -100).sum()
    padding = sum(view.width - sum(table.length(row) for row in found) for found in samples)
    assert view.padding == padding / (4 * view.width)


# --- in a terminal ------------------------------------------------------------------------------------------------

ROW = RowView(
    7,
    "train.jsonl:9",
    (
        Piece(1, "<s>", "<s>", False, True),
        Piece(20, "How", "How", False, False),
        Piece(21, " many\n", "x", False, False),
        Piece(243, "", "<0xF0>", True, False),
        Piece(131, "😀", "<0x80>", True, False),
        Piece(30000, "</s>", "</s>", True, True),
    ),
)


def printed(rows: list[RowView], *, ids: bool = False, width: int = 80, colour: bool = False) -> str:
    file = io.StringIO()
    system: Any = "truecolor" if colour else None
    print_rows(
        Console(file=file, width=width, highlight=False, force_terminal=colour, color_system=system), rows, ids=ids
    )
    return file.getvalue()


def test_a_row_without_colour() -> None:
    assert printed([ROW]) == (
        "⟦trained⟧  ▐special token▌  · space  ⏎ line end  ░ part of a character\n"
        "\n"
        "row 7 · train.jsonl:9 · 6 tokens, 3 trained · ends trained\n"
        "▐<s>▌How·many⏎\n"
        "⟦░😀▐</s>▌⟧\n"
    )


def test_a_row_with_ids() -> None:
    assert printed([ROW], ids=True, width=24).splitlines()[-4:] == [
        "▐<s>▌ How ·many⏎",
        "1     20  21",
        "⟦░<0xF0> 😀  ▐</s>▌⟧",
        "243      131 30000",
    ]


def test_colour_adds_nothing_but_colour() -> None:
    coloured = printed([ROW], colour=True)
    assert "\x1b[1;32m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == printed([ROW])


def test_what_a_terminal_would_obey_is_written() -> None:
    assert visible(HOSTILE) == (
        '<script>alert(1)</script>·&·"q"·\'\\u{202e}evil\\u{1b}[31m⇥\\u{d}⏎\n<END_Q>·\\u{b7}·\\u{27e6}'
    )
    assert visible("\u0301a") == "\u25cc\u0301a"
    said = printed([RowView(1, "f:1", (Piece(1, HOSTILE, "x", False, False), Piece(2, "", "[bold]", True, False)))])
    assert "\x1b" not in said
    assert "[31m" in said


# --- as a page ----------------------------------------------------------------------------------------------------

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Elements, attributes and the text of each token; fails where an element is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[tuple[str, str]] = []  # (id, text)
        self.depth: int | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if "data-id" in (known := dict(attributes)):
            self.tokens.append((known["data-id"] or "", ""))
            self.depth = len(self.open)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if self.depth is not None and len(self.open) < self.depth:
            self.depth = None

    def handle_data(self, data: str) -> None:
        if self.depth is not None:
            self.tokens[-1] = (self.tokens[-1][0], self.tokens[-1][1] + data)


def test_a_page_holds_each_token_once_and_its_exact_text() -> None:
    page = Page(rows_page("t", [ROW, ROW], None, ids=False))
    once = [("1", "<s>"), ("20", "How"), ("21", " many\n"), ("243", "<0xF0>"), ("131", "😀"), ("30000", "</s>")]
    assert page.tokens == 2 * once
    assert ("checked", None) not in page.attributes
    assert ("checked", None) in Page(rows_page("t", [ROW], None, ids=True)).attributes


def test_a_page_escapes_everything() -> None:
    row = RowView(1, HOSTILE, (Piece(1, HOSTILE, HOSTILE, True, False), Piece(2, HOSTILE, HOSTILE, False, True)))
    batch = BatchView(4, ((HOSTILE, (Run("trained", 3), Run("padding", 1))),))
    text = rows_page(HOSTILE, [row], batch, ids=False)
    page = Page(text)
    assert "script" not in page.tags
    assert {name for name, _ in page.attributes} <= {
        *("lang", "charset", "name", "content", "class", "data-id", "title", "type", "id", "style")
    }
    assert page.tokens[0][1] == HOSTILE.replace("\u202e", "\\u{202e}").replace("\x1b", "\\u{1b}").replace(
        "\r", "\\u{d}"
    )
    assert "\x1b" not in text


def test_a_page_fetches_nothing() -> None:
    text = rows_page("t", [ROW], BatchView(2, (("f:1", (Run("trained", 2),)),)), ids=True)
    assert not re.search(r"https?:|//|url\(|@import|src=|href=", text.replace("://", "//"))


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two training rows, here."""
    rows = [{"question": "How many?", "answer": f"It is {number}.\n#### {number}"} for number in (2, 34)]
    (tmp_path / "train.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = ("--dataset", "gsm8k", "--dataset.train", "train.jsonl")


def test_the_command_shows_rows_and_writes_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "preview", *FLAGS, "--row", "train.jsonl:3", "--html", "page.html"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[2].startswith("row 2 · train.jsonl:3 · ")
    assert lines[3:5] == ["▐<s>▌▐<START_Q>▌How·many?▐<END_Q>▌▐<START_A>▌⟦It·is·34.⏎", "####·34▐<END_A>▌⟧"]
    page = Page((folder / "page.html").read_text(encoding="utf-8"))
    assert "".join(text for _, text in page.tokens) == "<s><START_Q>How many?<END_Q><START_A>It is 34.\n#### 34<END_A>"
    assert not (folder / "llmft-runs").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--split", "test"], "--split test: there are only training rows"),
        (["--split", "validation"], "argument --split: invalid choice: 'validation' (choose from"),
        (["--pick", "best"], "argument --pick: invalid choice: 'best' (choose from"),
        (["--rows", "0"], "--rows 0: show at least 1 row"),
        (["--rows", "many"], "argument --rows: invalid int value: 'many'"),
        (["--row", "9"], "--row 9: there are rows 1 to 2"),
        (["--html", "nowhere/page.html"], "--html nowhere/page.html: there is no folder nowhere"),
        (["--html", "."], "--html .: is a folder"),
        (["--html", "/proc/page.html"], "--html /proc/page.html: cannot be written (No such file or directory)"),
        (["--row-s", "9"], "--row-s: no such flag"),
        (["--global-batch", "10", "--micro-batch", "3"], "--global-batch 10 cannot be shared"),
        (["--dataset.train", "no.jsonl"], "no.jsonl"),
    ],
)
def test_wrong_flags_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["dataset", "preview", *FLAGS, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("llmft: error: ")
    assert said in lines[0]


def test_no_cluster_is_asked(folder: Path) -> None:
    script = (
        "import sys; from llmft_core.cli.main import main; "
        f"code = main({['dataset', 'preview', *FLAGS]!r}); "
        "print([code, [name for name in ('ray', 'deepspeed') if name in sys.modules]])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[0, []]"


def test_help_lists_own_flags_and_those_of_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "preview", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--pick" in said
    assert "--context-length" in said
