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
from typing import Any

from llmft_core.data.encode import Encoder, TooLong
from llmft_core.data.report import SHOWN, DataReport, Faults, SplitReport
from llmft_core.data.sources import SplitSource
from llmft_core.data.tables import ARRAYS, TokenTable, write_selection, writing
from llmft_core.errors import InputError, LlmftError
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
    longest: int = 0  # tokens
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
        faults = Faults()
        tallies = {
            split: self._read_split(source, self.digests[split], draft / split, faults)
            for split, source in self.sources.items()
        }
        self.encoder.check_roles()  # before the rows: a misspelt role makes every row one in which nothing is trained
        faults.raise_any(sum(tally.read for tally in tallies.values()))
        for split, tally in tallies.items():
            if not tally.read:
                source = self.sources[split]
                raise InputError(f"{source.flag}: {source.name} has no rows; a {split} split needs at least one")
            refuse_loss(split, tally.read, len(tally.dropped), len(tally.cut), tally.longest, self.plan)
        splits: dict[Split, SplitReport] = {}
        for split, tally in tallies.items():
            splits[split] = self._report(split, TokenTable(draft / split), tally)
        if self.plan.data.validation_fraction > 0:
            splits |= self._hold_out(draft, tallies["train"])
        return DataReport(self.key, _content_digest([draft / split for split in splits]), splits)

    def _read_split(self, source: SplitSource, digest: str, folder: Path, faults: Faults) -> _Tally:
        tally = _Tally()
        waiting: deque[Origin] = deque()  # origins of the conversations that are in the encoder

        def conversations() -> Iterator[Conversation]:
            for origin, row in source.rows(digest):
                tally.read += 1
                parsed = row if isinstance(row, RowProblem) else self._parse(origin, row)
                if isinstance(parsed, RowProblem):
                    faults.add(origin, parsed)
                else:
                    waiting.append(origin)
                    yield parsed

        with writing(folder) as table:
            for encoded in self.encoder.encode_many(conversations()):
                origin = waiting.popleft()
                if isinstance(encoded, RowProblem):
                    faults.add(origin, encoded)
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

    def _parse(self, origin: Origin, row: dict[str, Any]) -> Conversation | RowProblem:
        try:
            return self.dataset.parse(row)
        except LlmftError:
            raise
        except Exception as error:
            raise LlmftError(
                f"{origin}: dataset format {self.dataset.name} failed on this row ({type(error).__name__}: {error}): "
                "a format returns a RowProblem for a row it cannot use; tell its author"
            ) from error

    def _report(self, split: Split, table: TokenTable, tally: _Tally, read: int | None = None) -> SplitReport:
        return SplitReport(
            source=self.sources[split].name,
            source_digest=self.digests[split],
            rows_read=tally.read if read is None else read,
            rows=len(table),
            dropped=len(tally.dropped),
            cut=len(tally.cut),
            tokens=table.total_tokens,
            trained_tokens=table.total_trained_tokens,
            longest=table.longest,
            longest_read=tally.longest,
            ends_trained=table.ends_trained,
            dropped_origins=tuple(map(str, tally.dropped[:SHOWN])),
            cut_origins=tuple(map(str, tally.cut[:SHOWN])),
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
                self._report("train", test, replace(tally, read=len(test), dropped=[], cut=test_cut)),
                longest_read=test.longest,
            ),
        }


def _content_digest(folders: list[Path]) -> str:
    hasher = hashlib.sha256()
    for folder in folders:
        for name in ARRAYS:
            if name != "lines":
                hasher.update((folder / f"{name}.npy").read_bytes())
    return hasher.hexdigest()
