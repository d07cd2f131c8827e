"""Makes one folder of the token cache: reads every row, reports all that cannot be used, writes the tables."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmft_core.data.checks import bom_finding, table_findings, token_findings
from llmft_core.data.encode import EncoderRecipe
from llmft_core.data.encode_blocks import EncodedBlock, Work
from llmft_core.data.faults import SHOWN, BadRows, Faults
from llmft_core.data.quarantine import Quarantine
from llmft_core.data.ray_engine import RayEngine
from llmft_core.data.repeats import RowHashes
from llmft_core.data.report import DataReport, Finding, SplitReport
from llmft_core.data.sources import SplitSource, joined_digest
from llmft_core.data.tables import MOST_FILES, TokenTable, write_selection, writing
from llmft_core.data.workers import LocalEngine
from llmft_core.errors import InputError
from llmft_core.extensions import DatasetFormat, Split
from llmft_core.plan import RunPlan
from llmft_core.values import Origin


def refuse_loss(split: Split, read: int, dropped: int, cut: int, longest: int, plan: RunPlan) -> None:
    """Raises InputError where more rows are dropped or cut than `--data.max-dropped` allows, or none are left."""
    lost = dropped + cut
    if lost <= plan.data.max_dropped * read and dropped < read:
        return
    allowed = f"--data.max-dropped {plan.data.max_dropped:g} allows {plan.data.max_dropped:.1%}"
    verb = {"drop": "dropped", "truncate": "dropped or cut", "error": "refused"}[plan.data.on_long]
    raise InputError(
        f"{lost} of {read} {split} rows ({lost / read:.1%}) are longer than --context-length {plan.context_length} and "
        f"would be {verb}; {allowed if dropped < read else 'none would be left'}: raise --context-length (the longest "
        f"row has {longest} tokens), or choose another --data.on-long or --data.max-dropped"
    )


def held_out(places: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Which of the rows (by position, in order) are kept for evaluation: exactly round(fraction × rows) of them, those
    whose hash of seed and place is smallest, so a row stays on its side when others come, go or are dropped.

    `places` (rows,) are as `place_numbers` makes them."""
    count = round(fraction * len(places))
    if not 0 < count < len(places):
        raise InputError(
            f"--data.validation-fraction {fraction:g} of {len(places)} rows is {count} rows: choose one that leaves "
            "rows on both sides, or give test rows"
        )
    ranks = b"".join(hashlib.sha256(f"{seed}:{place}".encode()).digest()[:8] for place in places.tolist())
    return np.sort(np.argsort(np.frombuffer(ranks, dtype=">u8"), kind="stable")[:count])


def place_numbers(table: TokenTable) -> npt.NDArray[np.int64]:
    """A number (rows,) for the file and line that each row came from."""
    return (table.files.astype(np.int64) << 32) | table.lines


@dataclass
class _Tally:
    """Counts of one split while it is read."""

    read: int = 0
    bad: int = 0
    longest: int = 0  # tokens
    warnings: list[Finding] = field(default_factory=list)
    dropped: int = 0
    dropped_first: list[Origin] = field(default_factory=list)
    cut: array[int] = field(default_factory=lambda: array("q"))  # their places, as `place_numbers` has them
    digest: str = ""  # of the table


@dataclass(frozen=True)
class Build:
    """Makes one cache folder. `digests` are those of the files of each split, `quarantine` is the file in which all
    rows will lie that cannot be used."""

    dataset: DatasetFormat
    plan: RunPlan
    tokenizer: Any
    recipe: EncoderRecipe
    sources: Mapping[Split, SplitSource]
    digests: Mapping[Split, Sequence[str]]
    key: str
    quarantine: Path

    def write(self, folder: Path) -> None:
        """All or nothing: the folder appears under its name when it is complete."""
        draft = folder.with_name(f".{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed; the lock is ours
        draft.mkdir()
        try:
            report = self._tables(draft)
            with (draft / "report.json").open("w", encoding="utf-8") as file:
                json.dump(asdict(report), file, indent=1, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _tables(self, draft: Path) -> DataReport:
        aside = Quarantine(self.quarantine)
        faults, hashes, roles = Faults(aside), RowHashes(), set[str]()
        tallies: dict[Split, _Tally] = {}
        try:
            with self._engine() as engine:
                for split in self.sources:
                    tallies[split] = self._read_split(split, draft / split, engine, faults, hashes, roles)
            self.recipe.check_roles(roles)  # before the rows: with a misspelt role nothing is trained in any of them
            aside.finish()
        finally:
            aside.discard()
        bad_rows = faults.bad_rows
        self._check_some_left(tallies, bad_rows)
        repeats, shared = hashes.findings()
        tokens = {token: self.tokenizer.convert_tokens_to_ids(token) for token in self.dataset.special_tokens}
        splits: dict[Split, SplitReport] = {}
        digests: dict[Split, str] = {}
        for split, tally in tallies.items():
            table = TokenTable(draft / split, [file.name for file in self.sources[split].files])
            tally.warnings += [*table_findings(split, table, tokens, self.plan.data.train_on), *repeats.get(split, ())]
            splits[split] = self._report(split, table, tally)
            digests[split] = tally.digest
        if self.plan.data.validation_fraction > 0:
            self._hold_out(draft, tallies["train"], splits, digests)
        warnings = (*token_findings(self.tokenizer, tokens), *shared)
        return DataReport(self.key, content_digest(digests), splits, bad_rows, warnings)

    def _engine(self) -> LocalEngine | RayEngine:
        work = Work(self.dataset, self.recipe)
        return RayEngine(work) if self.plan.data.engine == "ray" else LocalEngine(work, self.plan.data.processes)

    def _check_some_left(self, tallies: Mapping[Split, _Tally], bad_rows: BadRows) -> None:
        """Raises InputError where a split has no rows, or none that can be trained on."""
        for split, tally in tallies.items():
            source = self.sources[split]
            if not tally.read:
                raise InputError(f"{source.flag}: {source.name} has no rows; a {split} split needs at least one")
            if tally.bad + tally.dropped < tally.read:
                continue
            read = {name: (one.read, one.bad) for name, one in tallies.items()}
            bad_rows.refuse(read, self.plan.data, self.quarantine)
            refuse_loss(split, tally.read, tally.dropped, 0, tally.longest, self.plan)
            raise InputError(
                f"no {split} row is left: {tally.bad} of {tally.read} cannot be used ({self.quarantine}), and "
                f"{tally.dropped} are longer than --context-length {self.plan.context_length}"
            )

    def _read_split(
        self,
        split: Split,
        folder: Path,
        engine: LocalEngine | RayEngine,
        faults: Faults,
        hashes: RowHashes,
        roles: set[str],
    ) -> _Tally:
        source, digests = self.sources[split], self.digests[split]
        if len(source.files) > MOST_FILES:
            raise InputError(f"{source.flag}: {source.name}: a split has at most {MOST_FILES} files; join some of them")
        tally = _Tally()

        def name_of(file: int) -> str:
            return source.files[file].name

        with writing(folder) as table:
            for block in engine.encode(source.blocks(joined_digest(digests), digests), name_of):
                name = name_of(block.file)
                for line, problem, raw in block.problems:
                    faults.add(Origin(name, line), problem, raw)
                hashes.add(split, name, block.parsed_lines, block.hashes)
                roles |= block.roles
                self._count(tally, block, name)
                files = np.full(len(block.lines), block.file)
                table.append_rows(block.ids, block.trained, block.lengths, block.lines, files)
        tally.digest = table.digest()
        return tally

    def _count(self, tally: _Tally, block: EncodedBlock, file_name: str) -> None:
        if block.bom:
            tally.warnings.append(bom_finding(file_name))
        tally.read += block.read
        tally.bad += len(block.problems)
        tally.longest = max(tally.longest, block.longest)
        tally.dropped += len(block.dropped)
        for line in block.dropped[: SHOWN - len(tally.dropped_first)]:
            tally.dropped_first.append(Origin(file_name, line))
        tally.cut.extend((block.file << 32) | line for line in block.cut)

    def _report(self, split: Split, table: TokenTable, tally: _Tally) -> SplitReport:
        source = self.sources[split]
        cut = [Origin(source.files[place >> 32].name, place & 0xFFFFFFFF) for place in tally.cut[:SHOWN]]
        return SplitReport(
            source=source.name,
            source_digest=joined_digest(self.digests[split]),
            files=tuple(file.name for file in source.files),
            weights=source.weights,
            rows_read=tally.read,
            rows=len(table),
            bad=tally.bad,
            dropped=tally.dropped,
            cut=len(tally.cut),
            tokens=table.total_tokens,
            trained_tokens=table.total_trained_tokens,
            longest=table.longest,
            longest_read=tally.longest,
            ends_trained=table.ends_trained,
            dropped_origins=tuple(map(str, tally.dropped_first)),
            cut_origins=tuple(map(str, cut)),
            warnings=tuple(tally.warnings),
        )

    def _hold_out(
        self, draft: Path, tally: _Tally, splits: dict[Split, SplitReport], digests: dict[Split, str]
    ) -> None:
        """Divides the training table in two. What was dropped stays in the account of the training split."""
        whole_folder = (draft / "train").rename(draft / "whole")
        whole = TokenTable(whole_folder)
        places = place_numbers(whole)
        held = held_out(places, self.plan.data.validation_fraction, self.plan.seed)
        kept = np.ones(len(whole), dtype=bool)
        kept[held] = False
        digests["train"] = write_selection(whole, np.flatnonzero(kept), draft / "train")
        digests["test"] = write_selection(whole, held, draft / "test")
        shutil.rmtree(whole_folder)
        train, test = TokenTable(draft / "train"), TokenTable(draft / "test")
        cut = np.array(tally.cut, dtype=np.int64)
        is_held = np.isin(cut, places[held])
        test_cut, train_cut = array("q", cut[is_held].tolist()), array("q", cut[~is_held].tolist())
        splits["train"] = self._report("train", train, replace(tally, read=tally.read - len(test), cut=train_cut))
        splits["test"] = replace(
            self._report(
                "train", test, replace(tally, read=len(test), bad=0, dropped=0, dropped_first=[], cut=test_cut)
            ),
            weights=tuple(1.0 for _ in self.sources["train"].files),
            longest_read=test.longest,
            warnings=(),
        )


def content_digest(digests: Mapping[Split, str]) -> str:
    """SHA-256 (hex) that stands for the tokens and labels of all splits."""
    return hashlib.sha256(" ".join(f"{split}:{digest}" for split, digest in digests.items()).encode()).hexdigest()
