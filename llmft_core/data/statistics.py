"""Figures about the rows of a split, before any of them is dropped: what to know before --context-length, packing and
--global-batch are chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmft_core.data.batches import SHORTEST, padding_waste, steps_of
from llmft_core.data.order import Mix, Order, packed_rows
from llmft_core.data.preview import Speller
from llmft_core.data.tables import TokenTable
from llmft_core.plan import RunPlan
from llmft_core.views import ContextFit, Histogram, Percentiles, SplitStatistics, TokenCount, Vocabulary, round_numbers

CONTEXTS = (512, 1024, 2048, 4096)
"""Tokens: context lengths that are compared besides the plan's."""
MOST_BINS = 40
FREQUENT = 10
CHUNK = 1 << 22
"""Token ids that are counted at once."""

Lengths = npt.NDArray[np.integer]


def split_statistics(
    table: TokenTable, source: str, tokenizer: Any, plan: RunPlan, micro_batch: int, mix: Mix | None
) -> SplitStatistics:
    """Of a table that was made without a limit for the length; `source` is what its rows are from."""
    lengths = table.lengths
    return SplitStatistics(
        source=source,
        rows=len(table),
        tokens=table.total_tokens,
        trained_tokens=table.total_trained_tokens,
        ends_trained=table.ends_trained,
        lengths=percentiles(lengths),
        trained=percentiles(table.trained_counts),
        histogram=histogram(lengths),
        contexts=tuple(
            context_fit(lengths, mix, each, plan, micro_batch) for each in sorted({*CONTEXTS, plan.context_length})
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


def context_fit(
    lengths: npt.NDArray[np.int32], mix: Mix | None, context: int, plan: RunPlan, micro_batch: int
) -> ContextFit:
    """What `context` tokens would mean for the first epoch of rows of these lengths (rows,). The plan says the rest."""
    fits = lengths <= context
    over = len(lengths) - int(np.count_nonzero(fits))
    mix = Mix(mix.source_of_row[fits], mix.weights) if mix else None
    kept = lengths[fits]
    kept = kept[Order(kept, plan.seed, 0, mix).epoch(0).samples]  # in their order; a mix has some of them twice
    tokens = int(kept.sum())
    packed = packed_rows(kept, context)
    return ContextFit(
        context=context,
        over=over,
        over_share=over / len(lengths),
        rows=len(kept),
        tokens=tokens,
        steps=steps_of(len(kept), plan.global_batch, drop_last=plan.data.drop_last),
        packed_rows=packed,
        packed_steps=steps_of(packed, plan.global_batch, drop_last=plan.data.drop_last),
        sorted=padding_waste(kept.astype(np.int64), plan.global_batch, micro_batch, SHORTEST) if tokens else None,
        packed=1 - tokens / (packed * context) if tokens else None,
        full=1 - tokens / (len(kept) * context) if tokens else None,
    )


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
