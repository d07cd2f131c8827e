"""Rows of a token table as people read them: which token writes which text, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from llmft_core.data.batches import Form, arrange, collate
from llmft_core.data.order import Order
from llmft_core.data.tables import TokenTable
from llmft_core.errors import InputError
from llmft_core.plan import RunPlan
from llmft_core.values import IGNORED_LABEL
from llmft_core.views import BatchView, Pick, Piece, RowView, Run

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""


class Speller:
    """What each token of a tokenizer writes.

    Every tokenizer's own decoder is asked, behind a special token: so the first word keeps the space that decoders
    take from the start of a text, and no decoder's rules are known here.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast one of transformers with an eos token, as `load_tokenizer` returns it."""
        self.backend = tokenizer.backend_tokenizer
        self.special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._anchor = int(tokenizer.eos_token_id)
        self._before = len(self.backend.decode([self._anchor], skip_special_tokens=False))
        self._texts: dict[int, str] = {}

    def text(self, index: int) -> str:
        """What one token writes; holds INCOMPLETE where it is no whole character."""
        if index not in self._texts:
            self._texts[index] = self.name(index) if index in self.special else self._decoded([index])
        return self._texts[index]

    def name(self, index: int) -> str:
        """The vocabulary's spelling."""
        return self.backend.id_to_token(index) or f"[{index}]"

    def texts(self, ids: Sequence[int]) -> Iterator[str]:
        """What each token of a row adds to its text. A character of several tokens is written by the last of them."""
        waiting: list[int] = []  # tokens that together are no whole character yet
        for index in ids:
            alone = self.text(index)
            if INCOMPLETE not in alone:
                waiting.clear()
                yield alone
                continue
            waiting.append(index)
            together = self._decoded(waiting)
            if INCOMPLETE in together:
                yield ""
            else:
                waiting.clear()
                yield together

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self.backend.decode([self._anchor, *ids], skip_special_tokens=False)
        return text[self._before :]


def row_view(table: TokenTable, row: int, speller: Speller) -> RowView:
    """A row of a table, counted from 0."""
    ids, labels = table.row(row)
    trained = labels != IGNORED_LABEL
    trained[0] = False  # a label that the loss never sees
    numbers = [int(index) for index in ids]
    pieces = tuple(
        Piece(index, text, speller.name(index), bool(counts), index in speller.special)
        for index, text, counts in zip(numbers, speller.texts(numbers), trained, strict=True)
    )
    return RowView(row + 1, str(table.origin(row)), pieces)


def picked_rows(table: TokenTable, pick: Pick, count: int, seed: int) -> list[int]:
    """At most `count` rows, from 0: the first, the longest and so on. Equals keep their order."""
    if pick == "first":
        return list(range(min(count, len(table))))
    if pick == "random":
        return [int(row) for row in np.random.default_rng(seed).permutation(len(table))[:count]]
    if pick == "least-trained":
        order = np.argsort(table.trained_counts / table.lengths, kind="stable")
    else:
        sign = -1 if pick == "longest" else 1
        order = np.argsort(sign * table.lengths, kind="stable")
    return [int(row) for row in order[:count]]


def find_row(table: TokenTable, wanted: str, files: Sequence[str], dropped: Sequence[str]) -> int:
    """The row, from 0, that `N` (counted from 1) or `FILE:LINE` names; FILE may be the end of a path. `files` are those
    of the split, `dropped` the `FILE:LINE` of rows that were too long, as far as they are known. Raises InputError
    where there is no such row."""
    name, colon, line = wanted.rpartition(":")
    if not (line.isascii() and line.isdigit()) or (colon and not name):
        raise InputError(f"--row {wanted}: give FILE:LINE, or the number of a row, 1 to {len(table)}")
    number = int(line)
    if not name:
        if not 1 <= number <= len(table):
            raise InputError(f"--row {wanted}: there are rows 1 to {len(table)}")
        return number - 1
    named = {file for file in files if file == name or file.endswith(f"/{name}")}
    if not named:
        some = " and ".join(files[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "")
        raise InputError(f"--row {wanted}: no rows come from {name}; they come from {some}")
    distance = np.abs(table.lines.astype(np.int64) - number)
    found = [row for row in np.flatnonzero(distance == 0).tolist() if table.origin(row).source in named]
    if len(found) > 1:
        both = " and ".join(str(table.origin(row)) for row in found[:2])
        raise InputError(f"--row {wanted}: is {both}: give more of the path")
    if found:
        return int(found[0])
    if any(f"{file}:{number}" in dropped for file in named):
        raise InputError(f"--row {wanted}: is longer than the context and was dropped: raise --context-length")
    nearest = next((row for row in np.argsort(distance, kind="stable") if table.origin(int(row)).source in named), None)
    near = f"; the nearest is {table.origin(int(nearest))}" if nearest is not None else ""
    raise InputError(f"--row {wanted}: no row came from that line: it is empty, beyond the end, or was left out{near}")


def batch_view(table: TokenTable, order: Order, plan: RunPlan, micro_batch: int) -> BatchView:
    """The first micro-batch of the first step of the first epoch."""
    rows = order.epoch(0).step(0, plan.global_batch)
    numbers = arrange(table, rows, micro_batch)[0]
    batch = collate(table, rows, numbers, 0, Form.of(plan, pad_id=0))
    used = rows.lengths(table.lengths)
    layouts = []
    for number, labels in zip(numbers, batch.labels, strict=True):
        samples = rows.samples[rows.bounds[number] : rows.bounds[number + 1]]
        kinds = np.where(labels == IGNORED_LABEL, "untrained", "trained")
        kinds[used[number] :] = "padding"
        runs = tuple(Run(kind, len(list(group))) for kind, group in groupby(kinds.tolist()))
        layouts.append((" + ".join(str(table.origin(int(sample))) for sample in samples) or "no row", runs))
    return BatchView(batch.input_ids.shape[1], tuple(layouts))
