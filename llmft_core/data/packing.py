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
class Kind:
    """A kind of packed rows: there are `count` of them, and each holds samples of these `lengths`, in tokens."""

    lengths: tuple[int, ...]
    count: int


def best_fit(counts: npt.NDArray[np.int64], capacity: int) -> list[Kind]:
    """Pack `counts[n]` samples of n tokens each into rows of `capacity` tokens.

    The longest come first, and each goes into the fullest row that still has room for it. Raises ValueError for a
    sample that is longer than a row, or empty.
    """
    lengths = np.flatnonzero(counts)
    if len(lengths) and not 1 <= lengths[0] <= lengths[-1] <= capacity:
        raise ValueError(f"samples of {lengths[0]} to {lengths[-1]} tokens cannot be packed into rows of {capacity}")
    by_room: dict[int, list[Kind]] = {}  # tokens of room left → rows with so much
    rooms = 0  # bit n is set where by_room has n, so that the least room which suffices is one shift away
    full: list[Kind] = []
    for length in map(int, lengths[::-1]):
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                kind = by_room[room][-1]
            else:
                room, kind = capacity, Kind((), left)  # new rows, more than can be needed
            copies = min(room // length, left)  # what is left of the fullest row is less still: it takes the next too
            taken = min(kind.count, left // copies)
            left -= copies * taken
            kind.count -= taken
            if fitting and not kind.count:
                by_room[room].pop()
                if not by_room[room]:
                    del by_room[room]
                    rooms &= ~(1 << room)
            filled, room = Kind(kind.lengths + (length,) * copies, taken), room - copies * length
            if room:
                by_room.setdefault(room, []).append(filled)
                rooms |= 1 << room
            else:
                full.append(filled)
    return full + [kind for room in sorted(by_room) for kind in by_room[room]]


def deal(
    lengths: npt.NDArray[np.int32], capacity: int, random: np.random.Generator
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Pack samples of `lengths` (samples,) into rows of `capacity` tokens: at random among those of their length, and
    the rows in a random order.

    Returns the samples (samples,), row by row, and where each row begins and ends, (rows + 1,). Every sample is dealt
    once. Samples of one length are exchangeable, so each may meet any other.
    """
    drawn = random.permutation(np.arange(len(lengths), dtype=np.int32))
    drawn = drawn[np.argsort(lengths[drawn], kind="stable")]  # by length, at random within a length
    slots, sizes = lay_out(best_fit(np.bincount(lengths), capacity))
    dealt = np.empty_like(drawn)
    dealt[np.argsort(slots, kind="stable")] = drawn
    del drawn, slots  # these arrays are most of the memory that a run's data takes
    return shuffle_rows(dealt, sizes, random)


def lay_out(kinds: list[Kind]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The lengths (samples,) that packed rows have room for, row by row, and how many (rows,) each has."""
    if not kinds:
        return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32)
    slots = np.concatenate([np.tile(np.array(kind.lengths, dtype=np.int32), kind.count) for kind in kinds])
    sizes = np.array([len(kind.lengths) for kind in kinds], dtype=np.int32)
    return slots, np.repeat(sizes, [kind.count for kind in kinds])


def shuffle_rows(
    samples: npt.NDArray[np.int32], sizes: npt.NDArray[np.int32], random: np.random.Generator
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Rows of `sizes` (rows,) samples in another order: the samples (samples,), and the new bounds (rows + 1,)."""
    order = random.permutation(np.arange(len(sizes), dtype=np.int32))
    before = _bounds(sizes)[order]
    sizes = sizes[order]
    after = _bounds(sizes)
    places = np.repeat(before - after[:-1], sizes)  # how far each sample moves
    places += np.arange(len(samples), dtype=np.int32)
    return samples[places], after


def _bounds(sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    bounds = np.zeros(len(sizes) + 1, dtype=np.int32)
    np.cumsum(sizes, out=bounds[1:])
    return bounds
