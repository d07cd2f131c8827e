"""Makes one folder of the token cache: reads every row, reports all that cannot be used, writes the tables."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llmft_core.data.blocks import Block
from llmft_core.data.checks import bom_finding, parsed_rows, table_findings, token_findings
from llmft_core.data.encode import Encoder, TooLong
from llmft_core.data.faults import SHOWN, BadRows, Faults
from llmft_core.data.quarantine import Quarantine
from llmft_core.data.repeats import RowHashes
from llmft_core.data.report import DataReport, Finding, SplitReport
from llmft_core.data.sources import SplitSource
from llmft_core.data.tables import ARRAYS, TokenTable, write_selection, writing
from llmft_core.errors import InputError
from llmft_core.extensions import DatasetFormat, Split
from llmft_core.plan import RunPlan
from llmft_core.values import Conversation, Origin, RowProblem


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


def held_out(lines: list[int], fraction: float, seed: int) -> set[int]:
    """Which of the rows (by position) are kept for evaluation: exactly round(fraction × rows) of them, those whose
    hash of seed and line is smallest, so a row stays on its side when others come, go or are dropped."""
    count = round(fraction * len(lines))
    if not 0 < count < len(lines):
        raise InputError(
            f"--data.validation-fraction {fraction:g} of {len(lines)} rows is {count} rows: choose one that leaves "
            "rows on both sides, or give test rows"
        )

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{lines[index]}".encode()).digest()

    return set(sorted(range(len(lines)), key=rank)[:count])


@dataclass
class _Tally:
    """Counts of one split while it is read."""

    read: int = 0
    bad: int = 0
    longest: int = 0  # tokens
    warnings: list[Finding] = field(default_factory=list)
    dropped: list[Origin] = field(default_factory=list)
    cut: list[Origin] = field(default_factory=list)


@dataclass(frozen=True)
class Build:
    """Makes one cache folder."""

    dataset: DatasetFormat
    plan: RunPlan
    encoder: Encoder
    sources: Mapping[Split, SplitSource]
    digests: Mapping[Split, str]
    key: str
    quarantine: Path
    """The file in which all rows will lie that cannot be used."""

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
        faults, hashes = Faults(aside), RowHashes()
        try:
            tallies = {split: self._read_split(split, draft / split, faults, hashes) for split in self.sources}
            self.encoder.check_roles()  # before the rows: with a misspelt role nothing is trained in any of them
            aside.finish()
        finally:
            aside.discard()
        bad_rows = faults.bad_rows
        self._check_some_left(tallies, bad_rows)
        repeats, shared = hashes.findings()
        tokens = {token: self.encoder.tokenizer.convert_tokens_to_ids(token) for token in self.dataset.special_tokens}
        for split, tally in tallies.items():
            table = TokenTable(draft / split, self.sources[split].name)
            tally.warnings += [*table_findings(table, tokens, self.plan.data.train_on), *repeats.get(split, ())]
        splits: dict[Split, SplitReport] = {}
        for split, tally in tallies.items():
            splits[split] = self._report(split, TokenTable(draft / split), tally)
        if self.plan.data.validation_fraction > 0:
            splits |= self._hold_out(draft, tallies["train"])
        content = _content_digest([draft / split for split in splits])
        warnings = (*token_findings(self.encoder.tokenizer, tokens), *shared)
        return DataReport(self.key, content, splits, bad_rows, warnings)

    def _check_some_left(self, tallies: Mapping[Split, _Tally], bad_rows: BadRows) -> None:
        """Raises InputError where a split has no rows, or none that can be trained on."""
        for split, tally in tallies.items():
            source, dropped = self.sources[split], len(tally.dropped)
            if not tally.read:
                raise InputError(f"{source.flag}: {source.name} has no rows; a {split} split needs at least one")
            if tally.bad + dropped < tally.read:
                continue
            read = {name: (one.read, one.bad) for name, one in tallies.items()}
            bad_rows.refuse(read, self.plan.data, self.quarantine)
            refuse_loss(split, tally.read, dropped, 0, tally.longest, self.plan)
            raise InputError(
                f"no {split} row is left: of {tally.read} {tally.bad} cannot be used ({self.quarantine}) and {dropped} "
                f"are longer than --context-length {self.plan.context_length}"
            )

    def _read_split(self, split: Split, folder: Path, faults: Faults, hashes: RowHashes) -> _Tally:
        source, tally = self.sources[split], _Tally()
        waiting: deque[tuple[Block, Origin]] = deque()  # of the conversations that are in the encoder

        def refused(block: Block, origin: Origin, problem: RowProblem) -> None:
            tally.bad += 1
            faults.add(origin, problem, block.raw(origin.line))

        def conversations() -> Iterator[Conversation]:
            for block in source.blocks(self.digests[split]):
                name = source.files[block.file].name
                if block.bom:
                    tally.warnings.append(bom_finding(name))
                lines, found = [], []
                for line, parsed, hash_ in parsed_rows(self.dataset, block, name):
                    tally.read += 1
                    origin = Origin(name, line)
                    if isinstance(parsed, RowProblem):
                        refused(block, origin, parsed)
                        continue
                    lines.append(line)
                    found.append(hash_)
                    waiting.append((block, origin))
                    yield parsed
                hashes.add(split, name, lines, found)

        with writing(folder) as table:
            for encoded in self.encoder.encode_many(conversations()):
                block, origin = waiting.popleft()
                if isinstance(encoded, RowProblem):
                    refused(block, origin, encoded)
                    continue
                example = encoded.kept if isinstance(encoded, TooLong) else encoded
                tokens = encoded.tokens if isinstance(encoded, TooLong) else len(encoded.input_ids)
                tally.longest = max(tally.longest, tokens)
                if example is None:
                    tally.dropped.append(origin)
                    continue
                if isinstance(encoded, TooLong):
                    tally.cut.append(origin)
                table.append(example, origin.line)
        return tally

    def _report(self, split: Split, table: TokenTable, tally: _Tally) -> SplitReport:
        return SplitReport(
            source=self.sources[split].name,
            source_digest=self.digests[split],
            files=tuple(file.name for file in self.sources[split].files),
            weights=self.sources[split].weights,
            rows_read=tally.read,
            rows=len(table),
            bad=tally.bad,
            dropped=len(tally.dropped),
            cut=len(tally.cut),
            tokens=table.total_tokens,
            trained_tokens=table.total_trained_tokens,
            longest=table.longest,
            longest_read=tally.longest,
            ends_trained=table.ends_trained,
            dropped_origins=tuple(map(str, tally.dropped[:SHOWN])),
            cut_origins=tuple(map(str, tally.cut[:SHOWN])),
            warnings=tuple(tally.warnings),
        )

    def _hold_out(self, draft: Path, tally: _Tally) -> dict[Split, SplitReport]:
        """Divides the training table in two. What was dropped stays in the account of the training split."""
        whole_folder = (draft / "train").rename(draft / "whole")
        whole = TokenTable(whole_folder)
        held = held_out([int(line) for line in whole.lines], self.plan.data.validation_fraction, self.plan.seed)
        write_selection(whole, [row for row in range(len(whole)) if row not in held], draft / "train")
        write_selection(whole, sorted(held), draft / "test")
        shutil.rmtree(whole_folder)
        train, test = TokenTable(draft / "train"), TokenTable(draft / "test")
        held_lines = set(test.lines.tolist())
        test_cut = [origin for origin in tally.cut if origin.line in held_lines]
        train_cut = [origin for origin in tally.cut if origin.line not in held_lines]
        return {
            "train": self._report("train", train, replace(tally, read=tally.read - len(test), cut=train_cut)),
            "test": replace(
                self._report("train", test, replace(tally, read=len(test), bad=0, dropped=[], cut=test_cut)),
                weights=tuple(1.0 for _ in self.sources["train"].files),
                longest_read=test.longest,
                warnings=(),
            ),
        }


def _content_digest(folders: list[Path]) -> str:
    hasher = hashlib.sha256()
    for folder in folders:
        for name in ARRAYS:
            if name != "lines":
                hasher.update((folder / f"{name}.npy").read_bytes())
    return hasher.hexdigest()
