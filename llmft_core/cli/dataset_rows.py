"""What `llmft dataset preview` and `stats` share: the rows of a plan as tokens, and the files they write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmft_core.cli.flags import Given
from llmft_core.cli.quiet import quiet
from llmft_core.errors import InputError
from llmft_core.plan import RunPlan

if TYPE_CHECKING:
    from llmft_core.prepare import Material


def rows_of(plan: RunPlan, given: Given) -> Material:
    """The rows, tokenizer and model of a plan. No cluster, no weights, no storage of the run. Raises Problems."""
    if not given.debug:
        quiet()
    from llmft_core.prepare import prepare_data
    from llmft_core.storage.places import Places

    return prepare_data(plan, given.catalog, Places(given.catalog, plan.storage, plan.backends), say=_say)


def _say(text: str) -> None:
    if sys.stderr.isatty():  # rows may take minutes; who reads the output is not to find this in it
        print(f"… {text}", file=sys.stderr, flush=True)


def check_target(flag: str, file: str) -> None:
    """Before the work is done: whether there may be a file to write. Raises InputError."""
    if file and not Path(file).parent.is_dir():
        raise InputError(f"{flag} {file}: there is no folder {Path(file).parent}: make it, or name another")
    if file and Path(file).is_dir():
        raise InputError(f"{flag} {file}: is a folder: name a file in it")


def write(flag: str, file: str, text: str) -> None:
    """Write a file, over one that is there. Raises InputError."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{flag} {file}: cannot be written ({error.strerror}): name another file") from error
