"""Figures about a dataset in words, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmft_core.report import words
from llmft_core.report.histogram import histogram_lines
from llmft_core.report.tables import Table, aligned
from llmft_core.report.visible import visible
from llmft_core.views import ContextFit, Percentiles, SplitStatistics, TokenCount


@dataclass(frozen=True)
class Shown:
    """All splits, and what of the plan the figures depend on."""

    splits: Mapping[str, SplitStatistics]
    tokenizer: str
    context: int  # tokens
    global_batch: int  # rows
    micro_batch: int  # rows

    @property
    def notes(self) -> list[str]:
        """What the figures mean."""
        return [
            "Lengths are those before rows are dropped or cut; the rest of a line of contexts is of the rows that fit.",
            "Padding is the share of computed positions without a token. sorted: --data.packing none, rows of a global "
            f"batch of {self.global_batch} sorted by length, padded to the longest of their micro-batch of "
            f"{self.micro_batch}; packed: --data.packing best-fit; full: every row padded to the context.",
            "Steps are optimizer steps of one epoch. Packed, the global batch counts packed rows: fewer steps, each of "
            "more rows.",
        ]


def facts(split: SplitStatistics) -> list[tuple[str, str]]:
    """(label, text) lines."""
    vocabulary = split.vocabulary
    unknown = "this tokenizer has no unknown token"
    if vocabulary.unknown is not None:
        unknown = words.counted(vocabulary.unknown, "unknown token")
    return [
        ("rows", f"{words.count(split.rows)} of {split.source}"),
        ("tokens", f"{words.count(split.tokens)}, {words.share(split.trained_tokens / split.tokens)} of them trained"),
        ("ends", f"{words.share(split.ends_trained)} of the rows end trained"),
        (
            "vocabulary",
            f"{words.count(vocabulary.used)} of {words.count(vocabulary.size)} ids occur "
            f"({words.share(vocabulary.used / vocabulary.size)}); {unknown}",
        ),
    ]


def percentile_table(split: SplitStatistics) -> Table:
    """Tokens and trained tokens of the rows."""
    headings = ["of a row", "least", "5 %", "25 %", "median", "75 %", "90 %", "95 %", "99 %", "most", "mean"]

    def cells(label: str, of: Percentiles) -> list[str]:
        numbers = (of.least, of.p5, of.p25, of.median, of.p75, of.p90, of.p95, of.p99, of.most)
        return [label, *map(words.count, numbers), f"{of.mean:,.1f}"]

    return Table(headings, [cells("tokens", split.lengths), cells("trained", split.trained)])


def context_table(name: str, split: SplitStatistics, shown: Shown) -> Table:
    """What each context length would mean; optimizer steps are told of the split that is trained on."""
    headings = ["context", "longer rows", "padding sorted", "padding packed", "padding full", "packed rows"]

    def cells(fit: ContextFit) -> list[str]:
        longer = f"{words.count(fit.over)} ({100 * fit.over_share:.2f} %)" if fit.over else "0"
        padding = ["–" if waste is None else words.share(waste) for waste in (fit.sorted, fit.packed, fit.full)]
        steps = [words.count(steps) for steps in (fit.steps, fit.packed_steps)]
        numbers = [words.count(fit.context), longer, *padding, words.count(fit.packed_rows)]
        return [*numbers, *(steps if name == "train" else [])]

    headings += ["steps", "packed steps"] if name == "train" else []
    chosen = [fit.context for fit in split.contexts].index(shown.context)
    return Table(headings, [cells(fit) for fit in split.contexts], chosen)


def token_table(counts: tuple[TokenCount, ...], total: int) -> Table:
    """How often tokens occur."""
    return Table(
        ["token", "id", "count", "share"],
        [
            [
                visible(each.text or each.name).replace("\n", ""),
                str(each.id),
                words.count(each.count),
                f"{100 * each.count / total:.2f} %",
            ]
            for each in counts
        ],
    )


def statistics_lines(shown: Shown, width: int) -> Iterator[str]:
    """For a terminal `width` cells wide; a table is as wide as it is."""
    yield f"tokenizer {shown.tokenizer}"
    for name, split in shown.splits.items():
        yield from ("", f"{name} split")
        for label, text in facts(split):
            yield f"{label:>12}  {text}"
        yield ""
        yield from aligned(percentile_table(split))
        yield from ("", "tokens of a row, and how many rows")
        yield from histogram_lines(split.histogram, width)
        yield ""
        yield from aligned(context_table(name, split, shown))
        yield from ("", "special tokens")
        yield from aligned(token_table(split.vocabulary.special, split.tokens))
        yield from ("", "most frequent tokens")
        yield from aligned(token_table(split.vocabulary.frequent, split.tokens))
    yield ""
    yield from shown.notes
