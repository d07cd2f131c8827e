"""A table of words, in a terminal and as HTML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len

from llmft_core.report.page import escaped


@dataclass(frozen=True)
class Table:
    """Headings and rows. The first column begins at the left, the others are numbers and end at the right."""

    headings: list[str]
    rows: list[list[str]]
    chosen: int = -1
    """A row that is emphasised."""


def aligned(table: Table) -> Iterator[str]:
    """The table as lines, an arrow before the row that is emphasised.

    >>> list(aligned(Table(["token", "count"], [["a", "10"], ["b", "2"]], chosen=1)))
    ['  token  count', '  a         10', '→ b          2']
    """
    lines = [table.headings, *table.rows]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines, -1):
        rooms = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        cells = [line[0] + rooms[0], *(room + cell for cell, room in zip(line[1:], rooms[1:], strict=True))]
        yield (("→ " if number == table.chosen >= 0 else "  ") + "  ".join(cells)).rstrip()


def markup(table: Table) -> str:
    """The table as HTML, which scrolls by itself where the page is narrow."""

    def line(tag: str, cells: list[str]) -> str:
        return "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells)

    begins = ["<tr>"] * len(table.rows)
    if table.chosen >= 0:
        begins[table.chosen] = '<tr class="chosen">'
    rows = "".join(f"{begin}{line('td', row)}</tr>\n" for begin, row in zip(begins, table.rows, strict=True))
    return (
        f'<div class="wide" tabindex="0"><table>\n<thead><tr>{line("th", table.headings)}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
