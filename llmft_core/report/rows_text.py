"""Rows as tokens, in a terminal: readable in colour and without."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from llmft_core.report import words
from llmft_core.report.visible import (
    BEGIN_SPECIAL,
    BEGIN_TRAINED,
    END_SPECIAL,
    END_TRAINED,
    NEWLINE,
    PART,
    SPACE,
    plain,
    visible,
)
from llmft_core.views import Piece, RowView

TRAINED, SPECIAL, INCOMPLETE, QUIET = "bold green", "magenta", "yellow", "dim"
LEGEND = (
    f"{BEGIN_TRAINED}trained{END_TRAINED}  {BEGIN_SPECIAL}special token{END_SPECIAL}  {SPACE} space  "
    f"{NEWLINE} line end  {PART} part of a character"
)


def print_rows(console: Console, rows: list[RowView], *, ids: bool) -> None:
    """Each row under a line that says where it comes from. With `ids` every token stands above its id."""
    console.print(Text(LEGEND, QUIET))
    for row in rows:
        console.print()
        console.print(Text(headline(row), "bold"), soft_wrap=True)
        if ids:
            for line in lines_with_ids(row, console.width):
                console.print(line, soft_wrap=True)
        else:
            console.print(flowing(row), soft_wrap=True)


def headline(row: RowView) -> str:
    """`row 1 · train.jsonl:1 · 184 tokens, 120 trained · ends trained`."""
    end = "ends trained" if row.ends_trained else "does not end trained"
    counts = f"{words.counted(len(row.pieces), 'token')}, {words.count(row.trained_tokens)} trained"
    return f"row {row.number} · {plain(row.origin)} · {counts} · {end}"


def flowing(row: RowView) -> Text:
    """The row as a text, trained spans in double brackets."""
    text = Text()
    for piece, before, after in bracketed(row):
        text.append(before, TRAINED)
        text.append_text(drawn(piece))
        text.append(after, TRAINED)
    return text


def lines_with_ids(row: RowView, width: int) -> Iterator[Text]:
    """Pairs of lines, the tokens and their ids below, at most `width` cells wide where a token is not wider. A line
    break of the row breaks them, too."""
    tokens, ids = Text(), Text()
    for piece, before, after in bracketed(row):
        cell = Text(before, TRAINED) + drawn(piece, alone=True) + Text(after, TRAINED)
        room = max(cell.cell_len, len(str(piece.id))) + 1
        if tokens and tokens.cell_len + room - 1 > width:
            yield from _ended(tokens, ids)
            tokens, ids = Text(), Text()
        tokens += cell + " " * (room - cell.cell_len)
        ids.append(str(piece.id).ljust(room), QUIET)
        if "\n" in piece.text:
            yield from _ended(tokens, ids)
            tokens, ids = Text(), Text()
    if tokens:
        yield from _ended(tokens, ids)


def _ended(*lines: Text) -> tuple[Text, ...]:
    for line in lines:
        line.rstrip()
    return lines


def bracketed(row: RowView) -> Iterator[tuple[Piece, str, str]]:
    """Each token with the bracket before and after it, where a trained span begins and ends."""
    for number, piece in enumerate(row.pieces):
        previous = number > 0 and row.pieces[number - 1].trained
        following = number + 1 < len(row.pieces) and row.pieces[number + 1].trained
        before = BEGIN_TRAINED if piece.trained and not previous else ""
        yield piece, before, END_TRAINED if piece.trained and not following else ""


def drawn(piece: Piece, *, alone: bool = False) -> Text:
    """One token. `alone`: it stands in a column of its own, without line breaks, and a part of a character is named."""
    if piece.special:
        return Text(f"{BEGIN_SPECIAL}{visible(piece.text)}{END_SPECIAL}", SPECIAL)
    if not piece.text:
        return Text(PART + visible(piece.name) if alone else PART, INCOMPLETE)
    shown = visible(piece.text)
    return Text(shown.replace("\n", "") if alone else shown, TRAINED if piece.trained else "")
