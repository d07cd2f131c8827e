"""A histogram of lengths: bars in a terminal, a picture elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from llmft_core.report import words
from llmft_core.report.page import escaped
from llmft_core.views import Histogram, round_numbers

BLOCKS = " ▏▎▍▌▋▊▉"
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 30, 54
"""Margins of the picture, in its units."""

STYLE = """
svg.histogram { --quiet: #62666d; --line: #d9dbde; --bar: #3b72b8; --mark: #b3261e;
  font: 13px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg.histogram { --quiet: #9aa0a8; --line: #34383d;
  --bar: #6ea5ea; --mark: #ff8a80; } }
@media (max-width: 36rem) { svg.histogram { font-size: 20px; } }
svg.histogram text { fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg.histogram .bar { fill: var(--bar); }
svg.histogram .grid { stroke: var(--line); }
svg.histogram .mark { stroke: var(--mark); stroke-width: 2; stroke-dasharray: 6 4; }
svg.histogram text.marked { fill: var(--mark); font-weight: 600; }
"""


def bins(histogram: Histogram) -> Iterator[tuple[int, int, int]]:
    """(smallest, largest, count) of each bin; both ends belong to it."""
    for number, count in enumerate(histogram.counts):
        begin = histogram.first + number * histogram.step
        yield begin, begin + histogram.step - 1, count


def histogram_lines(histogram: Histogram, width: int) -> Iterator[str]:
    """One line a bin, at most `width` cells. A bin that holds something shows something."""
    most = max(histogram.counts)
    spans = [words.count(begin) if begin == end else f"{begin:,}–{end:,}" for begin, end, _ in bins(histogram)]
    counts = [words.count(count) for count in histogram.counts]
    label, number = max(map(len, spans)), max(map(len, counts))
    room = max(8, width - label - number - 4)
    for span, text, count in zip(spans, counts, histogram.counts, strict=True):
        eighths = max(int(count > 0), round(8 * room * count / most))
        bar = "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")
        yield f"{span:>{label}}  {text:>{number}}  {bar}".rstrip()


def histogram_svg(histogram: Histogram, context: int, what: str) -> str:
    """A picture that needs nothing else, light or dark as its reader likes. `context` is marked where it is in it."""
    most = max(histogram.counts)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    last = histogram.first + len(histogram.counts) * histogram.step

    def across(tokens: float) -> float:
        return LEFT + (tokens - histogram.first) / (last - histogram.first) * (right - LEFT)

    def up(count: float) -> float:
        return bottom - count / most * (bottom - TOP)

    parts = [f"<title>{escaped(what)}</title>", f"<style>{STYLE}</style>"]
    for count in ticks(0, most, 5):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{up(count):.1f}" y2="{up(count):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(count) + 4:.1f}" text-anchor="end">{words.count(count)}</text>')
    for begin, end, count in bins(histogram):
        if count:
            top = min(up(count), bottom - 1)  # one row among many thousands is seen, too
            wide = max(1.0, across(end + 1) - across(begin) - 1)
            parts.append(
                f'<rect class="bar" x="{across(begin):.1f}" y="{top:.1f}" width="{wide:.1f}" '
                f'height="{bottom - top:.1f}"><title>{begin:,} to {end:,} tokens: {words.counted(count, "row")}'
                "</title></rect>"
            )
    for tokens in ticks(histogram.first, last, 8):
        parts.append(f'<text x="{across(tokens):.1f}" y="{bottom + 20}" text-anchor="middle">{tokens:,}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">tokens a row</text>')
    parts.append(f'<text x="{LEFT}" y="16">rows</text>')
    if histogram.first <= context < last:
        x = across(context + 1)  # what is as long as the context still fits
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
        anchor = "end" if x > WIDTH / 2 else "start"
        shift = -6 if anchor == "end" else 6
        parts.append(
            f'<text class="marked" x="{x + shift:.1f}" y="{TOP - 8}" text-anchor="{anchor}">'
            f"--context-length {context:,}</text>"
        )
    return (
        f'<svg class="histogram" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def ticks(first: int, last: int, most: int) -> list[int]:
    """At most `most` + 1 round numbers in [first, last].

    >>> ticks(0, 730, 5)
    [0, 200, 400, 600]
    """
    step = next(step for step in round_numbers() if (last - first) / step <= most)
    return list(range(-(-first // step) * step, last + 1, step))
