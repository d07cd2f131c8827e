"""A look at all rows without a tokenizer: what can be known before there is a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmft_core.data.checks import bom_finding, parsed_rows
from llmft_core.data.faults import BadRows, Faults
from llmft_core.data.quarantine import Quarantine
from llmft_core.data.repeats import RowHashes
from llmft_core.data.report import Finding
from llmft_core.data.sources import SplitSource
from llmft_core.errors import InputError
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
    source cannot be read or has no rows."""
    aside = Quarantine(quarantine)
    faults, hashes = Faults(aside), RowHashes()
    findings: list[Finding] = []
    splits: dict[Split, tuple[int, int]] = {}
    occurring: set[str] = set()
    try:
        for split, source in sources.items():
            read = bad = 0
            for block in source.blocks():
                name = source.files[block.file].name
                if block.bom:
                    findings.append(bom_finding(name))
                lines, found = [], []
                for line, parsed, hash_ in parsed_rows(dataset, block, name):
                    read += 1
                    if isinstance(parsed, RowProblem):
                        bad += 1
                        faults.add(Origin(name, line), parsed, block.raw(line))
                        continue
                    lines.append(line)
                    found.append(hash_)
                    occurring.update(tag for one in parsed.messages for tag in (one.opening, one.closing))
                hashes.add(split, name, lines, found)
            if not read:
                raise InputError(f"{source.flag}: {source.name} has no rows; a {split} split needs at least one")
            splits[split] = (read, bad)
        aside.finish()
    finally:
        aside.discard()
    repeats, shared = hashes.findings()
    findings += [finding for split in splits for finding in repeats.get(split, ())]
    findings += [Finding(f"the token {tag} never occurs") for tag in dataset.special_tokens if tag not in occurring]
    return Scan(splits, faults.bad_rows, (*findings, *shared))
