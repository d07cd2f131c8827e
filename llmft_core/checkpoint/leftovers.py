"""What processes left in a run's folder: numbers that are taken, and folders that were never completed."""

from __future__ import annotations

import re

from llmft_core.checkpoint import publish, state, stored
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import delete_folder, list_files

KINDS = ((stored.NAME, publish.MARKER), (state.NAME, state.MARKER))


def sweep(run: Place) -> list[str]:
    """Remove the run's checkpoints and states that were never completed, and nothing else; their names. The run's lease
    is held: nobody is writing them."""
    files = list_files(run)
    folders: dict[str, set[str]] = {}
    for path in files:
        folder, _, file = path.partition("/")
        folders.setdefault(folder, set()).add(file)
    unfinished = [
        folder
        for folder, there in folders.items()
        if any(name.fullmatch(folder) and marker not in there for name, marker in KINDS)
    ]
    for folder in unfinished:
        delete_folder(run / folder)
    return sorted(unfinished)


def next_numbers(run: Place) -> dict[str, int]:
    """`checkpoint` and `state` → the first number that no folder of the run has."""
    numbers = {"checkpoint": 0, "state": 0}
    for folder in {path.partition("/")[0] for path in list_files(run)}:
        if found := re.fullmatch(r"(checkpoint|state)_(\d+)", folder):
            numbers[found[1]] = max(numbers[found[1]], int(found[2]) + 1)
    return numbers
