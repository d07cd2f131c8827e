"""Rows that occur twice, and test rows that are trained on: found by hashes, in a few bytes a row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmft_core.data.faults import SHOWN, counted_rows
from llmft_core.data.report import Finding
from llmft_core.data.rows import canonical
from llmft_core.extensions import Split
from llmft_core.values import Origin

Hashes = npt.NDArray[np.uint64]


def row_hash(row: dict[str, Any]) -> int:
    """64 bits that stand for a row, whatever the order of its keys and the spaces between them. In a million different
    rows two are taken for equal with a chance of one in 37 million."""
    return int.from_bytes(hashlib.blake2b(canonical(row), digest_size=8).digest(), "little")


@dataclass
class RowHashes:
    """The hashes of all rows of all splits, and where the rows are: 12 bytes a row, and about 10 more in `findings`."""

    _chunks: dict[Split, list[tuple[str, Hashes, npt.NDArray[np.int32]]]] = field(default_factory=dict)

    def add(self, split: Split, file: str, lines: npt.ArrayLike, hashes: npt.ArrayLike) -> None:
        """Rows of one file, in order: their lines (rows,) and hashes (rows,)."""
        chunk = (file, np.array(hashes, dtype=np.uint64), np.array(lines, dtype=np.int32))
        self._chunks.setdefault(split, []).append(chunk)

    def findings(self) -> tuple[dict[Split, tuple[Finding, ...]], tuple[Finding, ...]]:
        """Of each split, the rows that repeat an earlier one; and the test rows that are in the training split."""
        of_splits: dict[Split, tuple[Finding, ...]] = {}
        among: tuple[Finding, ...] = ()
        train = self._sorted("train")
        for split in self._chunks:
            ordered = train if split == "train" else self._sorted(split)
            repeats = ordered[1:][ordered[1:] == ordered[:-1]]
            if len(repeats):
                groups = self._first(split, np.unique(repeats), of_each=2)
                text = f"{counted_rows(len(repeats))} of {split} {'repeats' if len(repeats) == 1 else 'repeat'} another"
                of_splits[split] = (Finding(text, tuple((later, first) for first, later in groups.values())),)
        count = sum(int(np.count_nonzero(_among(hashes, train))) for _, hashes, _ in self._chunks.get("test", []))
        if count:
            tests = self._first("test", train, of_each=1)
            trained = self._first("train", np.array(sorted(tests), dtype=np.uint64), of_each=1)
            text = f"{counted_rows(count)} of test {'is' if count == 1 else 'are'} in train too"
            among = (Finding(text, tuple((origin, *trained[one]) for one, (origin,) in tests.items())),)
        return of_splits, among

    def _sorted(self, split: Split) -> Hashes:
        chunks = [hashes for _, hashes, _ in self._chunks.get(split, [])]
        ordered: Hashes = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.uint64)
        ordered.sort()
        return ordered

    def _first(self, split: Split, wanted: Hashes, of_each: int) -> dict[int, tuple[Origin, ...]]:
        """The first 20 of the (sorted) hashes that a split has, with the first origins of each."""
        chosen: dict[int, list[Origin]] = {}
        for one, _ in self._rows(split, wanted):
            chosen.setdefault(one, [])
            if len(chosen) == SHOWN:
                break
        missing = of_each * len(chosen)
        for one, origin in self._rows(split, np.array(sorted(chosen), dtype=np.uint64)):
            if len(chosen[one]) < of_each:
                chosen[one].append(origin)
                missing -= 1
            if not missing:
                break
        return {one: tuple(origins) for one, origins in chosen.items()}

    def _rows(self, split: Split, wanted: Hashes) -> Iterator[tuple[int, Origin]]:
        """Hash and origin of the split's rows, in order, whose hash is among the (sorted) wanted ones."""
        for file, hashes, lines in self._chunks.get(split, []):
            for index in np.flatnonzero(_among(hashes, wanted)):
                yield int(hashes[index]), Origin(file, int(lines[index]))


def _among(hashes: Hashes, ordered: Hashes) -> npt.NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(hashes), dtype=np.bool_)
    places = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    found: npt.NDArray[np.bool_] = ordered[places] == hashes
    return found
