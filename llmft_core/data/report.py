"""What became of the rows: counts, lengths and the rows that were left out; written beside the token tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmft_core.errors import Problem, Problems
from llmft_core.extensions import Split
from llmft_core.values import Origin, RowProblem

SHOWN = 20
"""Rows that are named one by one; the rest is counted."""


@dataclass(frozen=True)
class SplitReport:
    """One split. `rows_read = rows + dropped`; `cut` rows are among `rows`. Token counts are of the rows kept."""

    source: str
    files: tuple[str, ...]  # their names, in the order in which the table counts them
    source_digest: str  # SHA-256 of the file, or of the generated rows
    rows_read: int
    rows: int
    dropped: int  # longer than the context
    cut: int  # shortened to the context
    tokens: int
    trained_tokens: int  # after the shift: labels that the loss counts
    longest: int  # tokens
    longest_read: int  # tokens, before rows were dropped or cut
    ends_trained: float  # share of rows whose last token is trained
    dropped_origins: tuple[str, ...]  # `file:line` of the first 20
    cut_origins: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """All splits. `digest` is the key of the cache: sources, tokenizer, options and encoder. `content_digest` is that
    of the tokens and labels alone: equal where two ways led to the same rows."""

    digest: str
    content_digest: str
    splits: Mapping[Split, SplitReport]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DataReport:
        """The inverse of `dataclasses.asdict` through JSON. Raises KeyError or TypeError for anything else."""
        splits: dict[Split, SplitReport] = {}
        for split in ("train", "test"):
            if split in data["splits"]:
                values = dict(data["splits"][split])
                for name in ("files", "dropped_origins", "cut_origins"):
                    values[name] = tuple(values[name])
                splits[split] = SplitReport(**values)
        return cls(data["digest"], data["content_digest"], splits)


@dataclass
class Faults:
    """Rows that cannot be used: the first are kept, all are counted."""

    first: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, origin: Origin, problem: RowProblem) -> None:
        """One row's problem."""
        if len(self.first) < SHOWN:
            where = f"{origin}: {problem.field}" if problem.field else str(origin)
            self.first.append(Problem(where, problem.reason))
        kind = problem.reason.partition(": ")[0]  # what follows is of this row alone: its tokens, its column
        self.counts[f"{problem.field}: {kind}" if problem.field else kind] += 1

    def raise_any(self, rows_read: int) -> None:
        """Raises Problems where there are any: `file:line: field: reason`, then counts by reason."""
        if not self.first:
            return
        total = self.counts.total()
        lines = list(self.first)
        if total > 1:
            common = self.counts.most_common(SHOWN)
            lines += [Problem("", f"{_rows(count)}: {reason}") for reason, count in common]
            rest = total - sum(count for _, count in common)
            if rest:
                lines.append(Problem("", f"{_rows(rest)}: other reasons"))
        shown = f" (the first {SHOWN}, then counts by reason)" if total > SHOWN else ""
        raise Problems(lines, f"{total} of {_rows(rows_read)} cannot be used; mend or remove them{shown}:")


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
