"""Rows as tokens, as an HTML page. The text of the page is the text of the rows: white space is marked by the style
sheet alone, so what is copied is what was there."""

from __future__ import annotations

from html import escape

from llmft_core.report import words
from llmft_core.report.page import escaped, page
from llmft_core.report.rows_text import headline
from llmft_core.report.visible import NEWLINE, TAB, attached, printable
from llmft_core.views import BatchView, Piece, RowView

STYLE = f"""
.legend, .row {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .9rem; }}
.row {{ background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem;
  white-space: pre-wrap; overflow-wrap: anywhere; overflow-x: auto; line-height: 1.9; }}
.t {{ border-radius: .2rem; box-shadow: inset 0 0 0 1px var(--line); padding: .1em 0; }}
.trained {{ background: var(--trained); border-bottom: 2px solid var(--trained-line); }}
.special {{ background: var(--special); color: var(--special-ink); font-weight: 600; padding: .1em .25em; }}
.special.trained {{ border-bottom: 2px solid var(--trained-line); }}
.part {{ background: var(--part); color: var(--part-ink); font-style: italic; }}
.s {{ background: radial-gradient(circle, var(--quiet) .09em, transparent .11em); }}
.n::before {{ content: "{NEWLINE}"; color: var(--quiet); }}
.b::before {{ content: "{TAB}"; color: var(--quiet); }}
.x {{ color: var(--mark); }}
.legend > span {{ margin-right: .75rem; }}
.special, .part {{ white-space: nowrap; unicode-bidi: isolate; }}
body:has(#ids:checked) .row .t {{ display: inline-block; text-align: center; margin: 0 .1rem .35rem 0;
  line-height: 1.4; white-space: pre; }}
body:has(#ids:checked) .row .t::after {{ content: attr(data-id); display: block; font-size: .7rem;
  color: var(--quiet); font-weight: 400; font-style: normal; }}
body:has(#ids:checked) .row .n {{ white-space: nowrap; }}
.strip {{ display: grid; grid-template-columns: minmax(4rem, 12rem) 1fr; gap: .25rem .75rem; align-items: center; }}
.strip span {{ font-size: .8rem; color: var(--quiet); overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  direction: rtl; text-align: left; }}
.strip div {{ display: flex; height: 1.1rem; border: 1px solid var(--line); }}
i.untrained {{ background: var(--untrained); }}
i.trained {{ background: var(--trained-line); border: 0; }}
i.padding {{ background: repeating-linear-gradient(45deg, var(--padding) 0 4px, transparent 4px 8px); }}
i.key {{ display: inline-block; width: 1.4em; height: .8em; margin-right: .3em; border: 1px solid var(--line); }}
@media print {{ .choice {{ display: none; }}
  .t, .row, i {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }} }}
"""

LEGEND = (
    '<p class="legend"><span class="t trained">trained</span><span class="t special">special token</span>'
    '<span class="t part">part of a character</span><span class="t">other</span></p>\n'
)


def rows_page(title: str, rows: list[RowView], batch: BatchView | None, *, ids: bool) -> str:
    """The whole page. With `ids` the ids are shown at once; else a tick shows them."""
    ticked = " checked" if ids else ""
    choice = f'<p class="choice"><label><input type="checkbox" id="ids"{ticked}> token ids</label></p>\n'
    sections = [LEGEND, choice, *map(row_section, rows)]
    if batch is not None:
        sections.append(batch_section(batch))
    return page(title, "".join(sections), STYLE)


def row_section(row: RowView) -> str:
    """A row: a headline and its tokens."""
    tokens = "".join(token(piece) for piece in row.pieces)
    return f'<section><h2>{escaped(headline(row))}</h2>\n<div class="row">{tokens}</div></section>\n'


def token(piece: Piece) -> str:
    """One token: an element with its id."""
    kinds = ["t"]
    if piece.special:
        kinds.append("special")
    elif not piece.text:
        kinds.append("part")
    if piece.trained:
        kinds.append("trained")
    shown = marked(piece.text) if piece.text else escaped(piece.name)
    said = f"{piece.name!r}, id {piece.id}, {'trained' if piece.trained else 'not trained'}"
    return f'<span class="{" ".join(kinds)}" data-id="{piece.id}" title="{escaped(said)}">{shown}</span>'


def marked(text: str) -> str:
    """Text as markup: escaped, white space in elements that mark it, what does not print as its code point."""
    classes = {" ": "s", "\n": "n", "\t": "b"}
    parts = []
    for character in attached(text):
        if character in classes:
            parts.append(f'<span class="{classes[character]}">{character}</span>')
        elif (written := printable(character)) != character:
            parts.append(f'<span class="x">{escape(written)}</span>')
        else:
            parts.append(escape(character))
    return "".join(parts)


def batch_section(batch: BatchView) -> str:
    """One micro-batch as strips, one a row."""
    strips = []
    for label, runs in batch.rows:
        parts = "".join(
            f'<i class="{run.kind}" style="flex: {run.tokens} 0 0" title="{words.count(run.tokens)} {run.kind}"></i>'
            for run in runs
        )
        strips.append(f'<span title="{escaped(label)}"><bdi>{escaped(label)}</bdi></span><div>{parts}</div>\n')
    keys = "".join(f'<span><i class="key {kind}"></i>{kind}</span>' for kind in ("untrained", "trained", "padding"))
    return (
        f"<section><h2>The first micro-batch: {words.counted(len(batch.rows), 'row')} of {words.count(batch.width)} "
        f"tokens, {words.share(batch.padding)} padding</h2>\n"
        f'<p class="legend">{keys}</p>\n<div class="strip card">\n{"".join(strips)}</div></section>\n'
    )
