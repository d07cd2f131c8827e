"""Whether files in storage are still what was written down of them: every byte is read again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial

from llmft_core.storage.engine import STANDARD_BUDGET, Budget, Progress, Transfer
from llmft_core.storage.objects import Source
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import list_files


def check_files(
    place: Place,
    promised: Mapping[str, tuple[int, str]],
    *,
    budget: Budget = STANDARD_BUDGET,
    progress: Progress | None = None,
) -> tuple[int, list[str]]:
    """Reads files of a folder, several at once and without keeping them, and compares each with its bytes and SHA-256
    (hex); returns (bytes read, what is wrong: a line for each bad file, in the given order). Raises LlmftError where
    the store cannot be read."""
    there = list_files(place)
    wrong: dict[str, str] = {}
    to_read = []
    for name, (size, _) in promised.items():
        if name not in there:
            wrong[name] = f"{name}: is missing"
        elif there[name] != size:
            wrong[name] = f"{name}: has {there[name]} bytes, the manifest says {size}"
        else:
            to_read.append(name)
    transfer = Transfer(budget, progress)
    transfer.expect(sum(there[name] for name in to_read))

    def read(name: str) -> None:
        source = Source(place / name, transfer.ask)
        digest = hashlib.sha256()
        for start in range(0, source.size, budget.chunk):
            block = source.read(start, min(budget.chunk, source.size - start))
            digest.update(block)
            transfer.moved(len(block))
        source.check_unchanged()
        if digest.hexdigest() != promised[name][1]:
            wrong[name] = f"{name}: its bytes have changed (SHA-256 differs from the manifest's)"

    longest_first = sorted(to_read, key=lambda name: -there[name])
    transfer.run(partial(read, name) for name in longest_first)
    return transfer.total, [wrong[name] for name in promised if name in wrong]
