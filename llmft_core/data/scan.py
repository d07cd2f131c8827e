"""A look at all rows without a tokenizer: what can be known before there is a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmft_core.data.checks import FormatFailed, bom_finding, parse_row, token_findings
from llmft_core.data.faults import BadRows, Faults
from llmft_core.data.quarantine import Quarantine
from llmft_core.data.repeats import RowHashes, row_hash
from llmft_core.data.report import Finding
from llmft_core.data.sources import SplitSource
from llmft_core.errors import InputError, LlmftError
from llmft_core.extensions import DatasetFormat, Split
from llmft_core.values import Origin, RowProblem


@dataclass(frozen=True)
class Scan:
    """What became of the rows: (rows read, rows that cannot be used) of each split."""

    splits: Mapping[Split, tuple[int, int]]
    bad_rows: BadRows
    findings: tuple[Finding, ...]


def scan(dataset: DatasetFormat, sources: Mapping[Split, SplitSource], quarantine: Path) -> Scan:
    """Reads every row of every split, and writes those that cannot be used to `quarantine`. Raises InputError where a
    source cannot be read or has no rows, LlmftError where the format fails."""
    aside = Quarantine(quarantine)
    scanner = _Scanner(dataset, Faults(aside))
    try:
        splits = {split: scanner.read(split, source) for split, source in sources.items()}
        aside.finish()
    finally:
        aside.discard()
    repeats, shared = scanner.hashes.findings()
    of_splits = [finding for split in splits for finding in repeats.get(split, ())]
    never = token_findings(dataset.special_tokens, scanner.tags)
    return Scan(splits, scanner.faults.bad_rows, (*scanner.findings, *of_splits, *never, *shared))


@dataclass
class _Scanner:
    dataset: DatasetFormat
    faults: Faults
    hashes: RowHashes = field(default_factory=RowHashes)
    findings: list[Finding] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)

    def read(self, split: Split, source: SplitSource) -> tuple[int, int]:
        """Rows read, rows that cannot be used."""
        read = bad = 0
        for block in source.blocks():
            name = source.files[block.file].name
            if block.bom:
                self.findings.append(bom_finding(name))
            hashes = {}
            for line, row in block.rows():
                read += 1
                problem = row if isinstance(row, RowProblem) else self._problem(row, Origin(name, line))
                if problem is not None:
                    bad += 1
                    self.faults.add(Origin(name, line), problem, block.raw(line))
                elif not isinstance(row, RowProblem):
                    hashes[line] = row_hash(row)
            self.hashes.add(split, name, list(hashes), list(hashes.values()))
        if not read:
            raise InputError(f"{source.flag}: {source.name} has no rows; a {split} split needs at least one")
        return read, bad

    def _problem(self, row: dict[str, Any], origin: Origin) -> RowProblem | None:
        try:
            parsed = parse_row(self.dataset, row)
        except FormatFailed as error:
            raise LlmftError(f"{origin}: {error}") from error
        if isinstance(parsed, RowProblem):
            return parsed
        self.tags.update(tag for message in parsed.messages for tag in (message.opening, message.closing))
        return None
