"""Figures about a dataset as an HTML page."""

from __future__ import annotations

from llmft_core.report.histogram import histogram_svg
from llmft_core.report.page import escaped, page
from llmft_core.report.statistics import Shown, context_table, facts, percentile_table, token_table
from llmft_core.report.tables import markup
from llmft_core.views import SplitStatistics

STYLE = """
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0 1rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 1.25rem 0 .25rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem; }
td:first-child { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .9em; }
"""


def statistics_page(shown: Shown, title: str) -> str:
    """The whole page."""
    notes = "".join(f"<p>{escaped(note)}</p>\n" for note in shown.notes)
    sections = "".join(section(name, split, shown) for name, split in shown.splits.items())
    return page(title, f"<p>tokenizer {escaped(shown.tokenizer)}</p>\n{sections}{notes}", STYLE)


def section(name: str, split: SplitStatistics, shown: Shown) -> str:
    """One split."""
    lines = "".join(f"<dt>{escaped(label)}</dt><dd>{escaped(text)}</dd>\n" for label, text in facts(split))
    vocabulary = split.vocabulary
    return (
        f"<section><h2>{escaped(name)} split</h2>\n<dl>\n{lines}</dl>\n"
        f"<figure>{picture(name, split, shown)}</figure>\n"
        f"{markup(percentile_table(split))}"
        f"<h3>Context lengths</h3>\n{markup(context_table(name, split, shown))}"
        '<div class="beside">'
        f"<div><h3>Special tokens</h3>\n{markup(token_table(vocabulary.special, split.tokens))}</div>\n"
        f"<div><h3>Most frequent tokens</h3>\n{markup(token_table(vocabulary.frequent, split.tokens))}</div></div>"
        "</section>\n"
    )


def picture(name: str, split: SplitStatistics, shown: Shown) -> str:
    """The histogram of one split as SVG."""
    return histogram_svg(split.histogram, shown.context, f"Tokens of a row, {name} split")
