"""Rows that cannot be used: named, counted, written aside, and refused where the plan does not put up with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmft_core.data.quarantine import Quarantine
from llmft_core.errors import Problem, Problems
from llmft_core.extensions import Split
from llmft_core.plan import DataOptions
from llmft_core.values import Origin, RowProblem

SHOWN = 20
"""Rows that are named one by one; the rest is counted."""
KINDS = 1000
"""Different reasons that are counted apart: every row may have one of its own."""
OTHER = "other reasons"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    origin: Origin
    field: str
    reason: str

    @property
    def problem(self) -> Problem:
        """`file:line: field` and the reason."""
        return Problem(f"{self.origin}: {self.field}" if self.field else str(self.origin), self.reason)


@dataclass(frozen=True)
class BadRows:
    """The first 20, and all of them by reason."""

    first: tuple[BadRow, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)  # reason → rows

    @property
    def total(self) -> int:
        """Rows that cannot be used."""
        return sum(self.counts.values())

    def lines(self, quarantine: Path) -> list[Problem]:
        """`file:line: field: reason` of the first, counts by reason, and where all of them are."""
        lines = [row.problem for row in self.first]
        if self.total > 1:
            named = [item for item in Counter(self.counts).most_common() if item[0] != OTHER][:SHOWN]
            lines += [Problem("", f"{counted_rows(count)}: {reason}") for reason, count in named]
            rest = self.total - sum(count for _, count in named)
            if rest:
                lines.append(Problem("", f"{counted_rows(rest)}: {OTHER}"))
        return [*lines, Problem("", f"all of them, as they lie in their files: {quarantine}")]

    def refuse(self, splits: Mapping[Split, tuple[int, int]], options: DataOptions, quarantine: Path) -> None:
        """Raises Problems where there are any and `--data.on-bad-row` says error, or where they are a larger share of
        a split than `--data.max-bad-rows`. `splits`: (rows read, rows that cannot be used)."""
        shown = f" (the first {SHOWN}, then counts by reason)" if self.total > SHOWN else ""
        if self.total and options.on_bad_row == "error":
            read = sum(read for read, _ in splits.values())
            raise Problems(
                self.lines(quarantine),
                f"{self.total} of {counted_rows(read)} cannot be used; mend or remove them, or set them aside with "
                f"--data.on-bad-row quarantine{shown}:",
            )
        for split, (read, bad) in splits.items():
            if bad > options.max_bad_rows * read or 0 < bad == read:
                allowed = f"--data.max-bad-rows {options.max_bad_rows:g} allows {options.max_bad_rows:.1%}"
                raise Problems(
                    self.lines(quarantine),
                    f"{bad} of {read} {split} rows ({bad / read:.1%}) cannot be used; "
                    f"{'none would be left' if bad == read else allowed}; mend or remove them{shown}:",
                )


@dataclass
class Faults:
    """Takes rows that cannot be used, one by one."""

    quarantine: Quarantine | None = None
    first: list[BadRow] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, origin: Origin, problem: RowProblem, raw: bytes = b"") -> None:
        """One row's problem, and the row's bytes as they lie in its file. Raises OSError where the quarantine cannot be
        written."""
        if len(self.first) < SHOWN:
            self.first.append(BadRow(origin, problem.field, problem.reason))
        kind = problem.reason.partition(": ")[0]  # what follows is of this row alone: its tokens, its column
        kind = f"{problem.field}: {kind}" if problem.field else kind
        self.counts[kind if kind in self.counts or len(self.counts) < KINDS else OTHER] += 1
        if self.quarantine is not None:
            self.quarantine.add(origin, problem, raw)

    @property
    def bad_rows(self) -> BadRows:
        """All that were added."""
        return BadRows(tuple(self.first), dict(self.counts))


def counted_rows(count: int) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} row" if count == 1 else f"{count} rows"
