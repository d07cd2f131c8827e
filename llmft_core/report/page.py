"""A self-contained HTML page: nothing in it is fetched, no script, light and dark, phones and paper."""

from __future__ import annotations

from html import escape

from llmft_core.report.visible import plain

COLOURS = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --ink: #1c1d1f; --quiet: #62666d; --line: #d9dbde; --card: #ffffff;
  --trained: #d7f0df; --trained-line: #19783f; --special: #ece1fa; --special-ink: #6a2fb0;
  --part: #fbe9c6; --part-ink: #7a5200; --mark: #b3261e; --padding: #e6e7e9; --untrained: #a9b4c2; }
@media (prefers-color-scheme: dark) { :root {
  --page: #16181b; --ink: #e4e6e9; --quiet: #9aa0a8; --line: #34383d; --card: #1d2024;
  --trained: #17402a; --trained-line: #5fd08c; --special: #3a2859; --special-ink: #d2b3ff;
  --part: #4a3a12; --part-ink: #f0cd7c; --mark: #ff8a80; --padding: #2d3136; --untrained: #66717f; } }
"""

LAYOUT = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: .5rem 0 .25rem; }
h2 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; overflow-wrap: anywhere; }
p, figcaption { color: var(--quiet); margin: .25rem 0 .75rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .75rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--quiet); }
th:first-child, td:first-child, .text { text-align: left; }
tr.chosen td { font-weight: 700; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .9em; }
figure { margin: 1rem 0; }
svg { display: block; width: 100%; height: auto; }
@media print { body { max-width: none; padding: 0; } .card, figure, tr { break-inside: avoid; } }
"""


def escaped(text: str) -> str:
    """Text as markup, also within quotes; what does not print as its code point."""
    return escape(plain(text))


def page(title: str, body: str, style: str = "") -> str:
    """The whole document. `title` is text, `body` and `style` are markup that has been escaped."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{COLOURS}{LAYOUT}{style}</style>\n</head>\n<body>\n"
        f"<h1>{escaped(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
