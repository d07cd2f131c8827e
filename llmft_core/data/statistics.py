"""Figures about the rows of a split, before any of them is dropped: what to know before --context-length, packing and
--global-batch are chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmft_core.data.batches import SHORTEST, epoch_order, steps_per_epoch
from llmft_core.data.preview import Speller, trained_tokens
from llmft_core.data.tables import TokenTable
from llmft_core.plan import RunPlan
from llmft_core.views import ContextFit, Histogram, Percentiles, SplitStatistics, TokenCount, Vocabulary, round_numbers

CONTEXTS = (512, 1024, 2048, 4096)
"""Tokens: context lengths that are compared besides the plan's."""
MOST_BINS = 40
FREQUENT = 10
CHUNK = 1 << 22
"""Token ids that are counted at once."""

Lengths = npt.NDArray[np.int64]


def split_statistics(
    table: TokenTable, source: str, tokenizer: Any, plan: RunPlan, micro_batch: int
) -> SplitStatistics:
    """Of a table that was made without a limit for the length; `source` is what its rows are from."""
    lengths = np.diff(table.offsets)
    return SplitStatistics(
        source=source,
        rows=len(table),
        tokens=table.total_tokens,
        trained_tokens=table.total_trained_tokens,
        ends_trained=table.ends_trained,
        lengths=percentiles(lengths),
        trained=percentiles(trained_tokens(table)),
        histogram=histogram(lengths),
        contexts=tuple(
            context_fit(lengths, each, plan.seed, plan.global_batch, micro_batch)
            for each in sorted({*CONTEXTS, plan.context_length})
        ),
        vocabulary=vocabulary(table, tokenizer),
    )


def percentiles(values: Lengths) -> Percentiles:
    """Of at least one value."""
    ordered = np.sort(values)

    def at(percent: int) -> int:
        return int(ordered[max(0, -(-percent * len(ordered) // 100) - 1)])

    return Percentiles(at(0), at(5), at(25), at(50), at(75), at(90), at(95), at(99), at(100), float(values.mean()))


def histogram(lengths: Lengths) -> Histogram:
    """At most 40 bins that begin at multiples of a round step: 1, 2 or 5 times a power of ten."""
    least, most = int(lengths.min()), int(lengths.max())
    step = next(step for step in round_numbers() if most // step - least // step < MOST_BINS)
    first = least // step
    counts = np.bincount(lengths // step - first)
    return Histogram(first * step, step, tuple(int(count) for count in counts))


def context_fit(lengths: Lengths, context: int, seed: int, global_batch: int, micro_batch: int) -> ContextFit:
    """What `context` tokens would mean for rows of these lengths (rows,)."""
    kept = lengths[lengths <= context]
    tokens = int(kept.sum())
    packed = best_fit_rows(kept, context)
    over = len(lengths) - len(kept)
    return ContextFit(
        context=context,
        over=over,
        over_share=over / len(lengths),
        rows=len(kept),
        tokens=tokens,
        packed_rows=packed,
        sorted=sorted_waste(kept, seed, global_batch, micro_batch) if tokens else None,
        packed=1 - tokens / (packed * context) if tokens else None,
        full=1 - tokens / (len(kept) * context) if tokens else None,
    )


def sorted_waste(lengths: Lengths, seed: int, global_batch: int, micro_batch: int) -> float:
    """As `batches.padding_waste`, from lengths (rows,) alone."""
    steps = steps_per_epoch(len(lengths), global_batch)
    filled = np.zeros(steps * global_batch, dtype=np.int64)
    filled[: len(lengths)] = lengths[epoch_order(len(lengths), seed, 0)]
    micro_batches = np.sort(filled.reshape(steps, global_batch), axis=1)[:, ::-1].reshape(-1, micro_batch)
    positions = np.maximum(micro_batches.max(axis=1), SHORTEST).sum() * micro_batch
    return 1 - int(lengths.sum()) / int(positions)


def best_fit_rows(lengths: Lengths, context: int) -> int:
    """How many rows of `context` tokens hold rows of these lengths, packed best-fit, the longest first.

    On the histogram of lengths, so the cost does not depend on the number of rows (Krell et al. 2021, "Efficient
    Sequence Packing without Cross-contamination").
    """
    with_room = np.zeros(context + 1, dtype=np.int64)  # room in tokens → packed rows that have it
    packed = 0
    items = np.bincount(lengths, minlength=1)
    for length in np.flatnonzero(items)[::-1].tolist():
        left = int(items[length])
        while left:
            fitting = np.flatnonzero(with_room[length:])
            room = length + int(fitting[0]) if len(fitting) else context
            each = room // length  # the row that fits best stays that until no more goes in
            rows = -(-left // each)
            if len(fitting):
                rows = min(rows, int(with_room[room]))
                with_room[room] -= rows
            else:
                packed += rows
            full, rest = divmod(min(left, rows * each), each)
            with_room[room - each * length] += full
            if rest:
                with_room[room - rest * length] += 1
            left -= full * each + rest
    return packed


def vocabulary(table: TokenTable, tokenizer: Any) -> Vocabulary:
    """Which ids of the tokenizer occur, and how often."""
    numbers = max(tokenizer.get_vocab().values()) + 1  # more than there are where a vocabulary has holes
    counts = np.zeros(numbers, dtype=np.int64)
    for begin in range(0, len(table.ids), CHUNK):
        counts += np.bincount(table.ids[begin : begin + CHUNK], minlength=numbers)
    speller = Speller(tokenizer)

    def counted(index: int) -> TokenCount:
        return TokenCount(index, speller.name(index), speller.text(index), int(counts[index]))

    plain = counts.copy()
    plain[sorted(speller.special)] = 0
    frequent = np.argsort(-plain, kind="stable")[:FREQUENT]
    unknown = tokenizer.unk_token_id
    return Vocabulary(
        size=len(tokenizer),
        used=int(np.count_nonzero(counts)),
        unknown=None if unknown is None else int(counts[unknown]),
        special=tuple(counted(index) for index in sorted(speller.special)),
        frequent=tuple(counted(int(index)) for index in frequent if plain[index]),
    )
