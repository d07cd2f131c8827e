"""What became of the rows: counts, lengths, the rows that were left out and what looks wrong; beside the tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmft_core.data.faults import BadRow, BadRows
from llmft_core.extensions import Split
from llmft_core.values import Origin


@dataclass(frozen=True)
class Finding:
    """What looks wrong and stops nothing. `origins`: the first 20 places, each of one row or of several that belong
    together (`a.jsonl:7 = a.jsonl:2`)."""

    text: str
    origins: tuple[tuple[Origin, ...], ...] = ()

    def __str__(self) -> str:
        if not self.origins:
            return self.text
        return f"{self.text}: {', '.join(' = '.join(map(str, group)) for group in self.origins)}"


@dataclass(frozen=True)
class SplitReport:
    """One split. `rows_read = rows + dropped + bad`; `cut` rows are among `rows`. Token counts are of the rows kept."""

    source: str
    source_digest: str  # SHA-256 of the file, or of the generated rows
    files: tuple[str, ...]  # names of the files, in the order that tables count them in
    weights: tuple[float, ...]  # passes of an epoch over each file
    rows_read: int
    rows: int
    bad: int  # cannot be used: set aside
    dropped: int  # longer than the context
    cut: int  # shortened to the context
    tokens: int
    trained_tokens: int  # after the shift: labels that the loss counts
    longest: int  # tokens
    longest_read: int  # tokens, before rows were dropped or cut
    ends_trained: float  # share of rows whose last token is trained
    dropped_origins: tuple[str, ...]  # `file:line` of the first 20
    cut_origins: tuple[str, ...]
    warnings: tuple[Finding, ...] = ()

    def renamed(self, source: str, files: Sequence[str], weights: Sequence[float]) -> SplitReport:
        """The same rows, read from elsewhere."""
        names = dict(zip(self.files, files, strict=True))

        def moved(origins: tuple[str, ...]) -> tuple[str, ...]:
            split = (origin.rpartition(":") for origin in origins)
            return tuple(f"{names[file]}:{line}" for file, _, line in split)

        return replace(
            self,
            source=source,
            files=tuple(files),
            weights=tuple(weights),
            dropped_origins=moved(self.dropped_origins),
            cut_origins=moved(self.cut_origins),
        )


@dataclass(frozen=True)
class DataReport:
    """All splits. `digest` is the key of the cache: sources, tokenizer, options and encoder. `content_digest` is that
    of the tokens and labels alone: equal where two ways led to the same rows."""

    digest: str
    content_digest: str
    splits: Mapping[Split, SplitReport]
    bad_rows: BadRows = field(default_factory=BadRows)
    warnings: tuple[Finding, ...] = ()  # that are of no single split

    def findings(self) -> Iterator[Finding]:
        """All warnings."""
        for split in self.splits.values():
            yield from split.warnings
        yield from self.warnings

    def renamed(self, names: Mapping[str, str]) -> DataReport:
        """With other names of the files in bad rows and warnings."""

        def moved(finding: Finding) -> Finding:
            groups = (tuple(_moved(origin, names) for origin in group) for group in finding.origins)
            return replace(finding, origins=tuple(groups))

        return replace(
            self,
            splits={
                name: replace(split, warnings=tuple(map(moved, split.warnings))) for name, split in self.splits.items()
            },
            bad_rows=replace(
                self.bad_rows,
                first=tuple(replace(row, origin=_moved(row.origin, names)) for row in self.bad_rows.first),
            ),
            warnings=tuple(map(moved, self.warnings)),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DataReport:
        """The inverse of `dataclasses.asdict` through JSON. Raises KeyError or TypeError for anything else."""
        splits: dict[Split, SplitReport] = {}
        for split in ("train", "test"):
            if split in data["splits"]:
                values = dict(data["splits"][split])
                for name in ("files", "weights", "dropped_origins", "cut_origins"):
                    values[name] = tuple(values[name])
                values["warnings"] = _findings(values["warnings"])
                splits[split] = SplitReport(**values)
        bad = data["bad_rows"]
        first = tuple(BadRow(Origin(**row["origin"]), row["field"], row["reason"]) for row in bad["first"])
        return cls(
            data["digest"],
            data["content_digest"],
            splits,
            BadRows(first, dict(bad["counts"])),
            _findings(data["warnings"]),
        )


def _moved(origin: Origin, names: Mapping[str, str]) -> Origin:
    return Origin(names[origin.source], origin.line)


def _findings(data: Sequence[Mapping[str, Any]]) -> tuple[Finding, ...]:
    return tuple(
        Finding(one["text"], tuple(tuple(Origin(**origin) for origin in group) for group in one["origins"]))
        for one in data
    )
