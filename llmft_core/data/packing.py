"""Best-fit packing: which lengths share a row, found on the histogram of lengths and not sample by sample.

Source: Krell, Kosec, Perez and Fitzgibbon 2021, "Efficient Sequence Packing without Cross-contamination"
(longest-pack-first histogram packing). It is best-fit decreasing, in a time that does not depend on the number of
samples but on how many different lengths there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class Rows:
    """Packed rows of one kind: `count` rows, each of which holds samples of these `lengths`."""

    lengths: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Packing:
    """Packed rows made of slots: row r has the slots [bounds[r], bounds[r + 1]). `slots` (samples,) int32 is the length
    of the sample that fits into each, in tokens; `bounds` is (rows + 1,) int64. Which sample it is, is dealt later."""

    slots: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int64]


def best_fit(counts: npt.NDArray[np.int64], capacity: int) -> list[Rows]:
    """Pack `counts[n]` samples of n tokens each into rows of `capacity` tokens.

    The longest come first, and each goes into the fullest row that still has room for it. Raises ValueError for a
    sample that is longer than a row, or empty.
    """
    lengths = np.flatnonzero(counts)
    if len(lengths) and not 1 <= lengths[0] <= lengths[-1] <= capacity:
        raise ValueError(f"samples of {lengths[0]} to {lengths[-1]} tokens cannot be packed into rows of {capacity}")
    by_room: dict[int, list[Rows]] = {}  # tokens of room left → rows with so much
    rooms = 0  # bit n is set where by_room has n, so that the least room which suffices is one shift away
    full: list[Rows] = []
    for length in map(int, lengths[::-1]):
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows = by_room[room][-1]
            else:
                room, rows = capacity, Rows((), left)  # new rows, more than can be needed
            copies = min(room // length, left)  # what is left of the fullest row is less still: it takes the next too
            taken = min(rows.count, left // copies)
            left -= copies * taken
            rows.count -= taken
            if fitting and not rows.count:
                by_room[room].pop()
                if not by_room[room]:
                    del by_room[room]
                    rooms &= ~(1 << room)
            filled, room = Rows(rows.lengths + (length,) * copies, taken), room - copies * length
            if room:
                by_room.setdefault(room, []).append(filled)
                rooms |= 1 << room
            else:
                full.append(filled)
    return full + [rows for room in sorted(by_room) for rows in by_room[room]]


def lay_out(packed: list[Rows]) -> Packing:
    """The rows one by one."""
    if not packed:
        return Packing(np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64))
    slots = np.concatenate([np.tile(np.array(rows.lengths, dtype=np.int32), rows.count) for rows in packed])
    sizes = np.repeat([len(rows.lengths) for rows in packed], [rows.count for rows in packed])
    return Packing(slots, np.concatenate([[0], np.cumsum(sizes)]))


def deal(
    lengths: npt.NDArray[np.int32], packing: Packing, random: np.random.Generator
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Deal samples of `lengths` (samples,) at random to the slots of their length, and shuffle the rows.

    Returns which sample is in each slot (samples,), and the bounds (rows + 1,) of the rows. Every sample is dealt once;
    samples of one length are exchangeable, so each may meet any other.
    """
    drawn = random.permutation(np.arange(len(lengths), dtype=np.int32))
    drawn = drawn[np.argsort(lengths[drawn], kind="stable")]  # by length, at random within a length
    dealt = np.empty_like(drawn)
    dealt[np.argsort(packing.slots, kind="stable")] = drawn
    sizes = np.diff(packing.bounds)
    order = random.permutation(len(sizes))
    bounds = np.concatenate([[0], np.cumsum(sizes[order])])
    moved = np.repeat((packing.bounds[order] - bounds[:-1]).astype(np.int32), sizes[order])
    moved += np.arange(len(lengths), dtype=np.int32)
    return dealt[moved], bounds
