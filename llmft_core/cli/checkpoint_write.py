"""`llmft checkpoint push`, `merge` and `prune`: the actions that change what lies in storage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.cli.describe import print_table
from llmft_core.errors import InputError

if TYPE_CHECKING:
    from llmft_core.cli.reach import Reached
    from llmft_core.storage.places import Place


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `prune`, named as a plan's `checkpoint` options are."""
    group = parser.add_argument_group("prune")
    group.add_argument("--keep-last", type=int, metavar="N", help="keep so many of the newest checkpoints")
    group.add_argument("--keep-best", type=int, metavar="N", help="keep so many of the best checkpoints too")
    group.add_argument("--best-by", metavar="{eval_loss,train_loss}", help="what makes one good [eval_loss]")
    group.add_argument(
        "--incomplete", action="store_true", help="remove incomplete checkpoints too, unless younger than an hour"
    )
    group.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")


def check_flags(own: argparse.Namespace) -> None:
    """Raises InputError where flags of `prune` do not make sense, or stand beside another action."""
    given = [
        flag
        for flag, value in (
            ("--keep-last", own.keep_last),
            ("--keep-best", own.keep_best),
            ("--best-by", own.best_by),
            ("--incomplete", own.incomplete or None),
            ("--dry-run", own.dry_run or None),
        )
        if value is not None
    ]
    if own.action != "prune":
        if given:
            raise InputError(f"{given[0]} belongs to `llmft checkpoint prune RUN`, not to {own.action}")
        return
    for flag, value in (("--keep-last", own.keep_last), ("--keep-best", own.keep_best)):
        if value is not None and value < 0:
            raise InputError(f"{flag} {value}: give a number from 1 on")
    if not own.keep_last and not own.keep_best:
        raise InputError(
            "prune needs --keep-last N or --keep-best N, at least 1: it never removes every checkpoint (remove the "
            "run's folder for that)"
        )
    if own.best_by not in (None, "eval_loss", "train_loss"):
        raise InputError(f"--best-by {own.best_by}: give eval_loss or train_loss")
    if own.best_by and not own.keep_best:
        raise InputError("--best-by says how --keep-best N chooses: give that too")


def push(own: argparse.Namespace, folder: Place, target: Place) -> None:
    """Upload a folder, and say where it is."""
    from llmft_core.checkpoint.push import push
    from llmft_core.checkpoint.stored import NAME
    from llmft_core.report import words
    from llmft_core.report.transfers import transfer_bar

    with transfer_bar(f"copying to {target.uri}") as bar:
        pushed = push(Path(folder.path), folder, target, bar)
    continued = f", {words.size(pushed.continued)} of it lay there already" if pushed.continued else ""
    print(f"{target.uri}: {words.size(pushed.bytes)}, complete and verified{continued}; {own.place} is kept")
    if not NAME.fullmatch(target.name):
        print(f"note: `list` and `prune` see only folders named checkpoint_00000 and so on, not {target.name}")


def merge(reached: Reached, place: Place) -> None:
    """Write an adapter and its base as a whole checkpoint, and say where it is. Raises InputError where there is no
    adapter."""
    from llmft_core.merge import adapted, base_of, merge
    from llmft_core.report import words

    own = reached.own
    adapter = adapted(place)
    if adapter is None:
        raise InputError(f"{place.uri} holds a whole model already: there is nothing to merge")
    base = base_of(
        adapter, reached.plan(own.base or adapter.plan.model.name), own.base, reached.catalog, reached.places
    )
    target = reached.places.place(own.out)
    size = merge(adapter, base, target, reached.catalog)
    print(f"{target.uri}: {words.size(size)}, complete and verified: {place.uri} in the weights of {base.path}")


def prune(own: argparse.Namespace, run: Place) -> None:
    """Remove what the rules do not keep; print one line a checkpoint."""
    from llmft_core.checkpoint.prune import carry_out, decide
    from llmft_core.checkpoint.stored import StoredCheckpoint
    from llmft_core.plan import CheckpointOptions
    from llmft_core.report import words

    chosen: dict[str, Any] = {"keep-last": own.keep_last or 0, "keep-best": own.keep_best or 0}
    options = CheckpointOptions.model_validate({**chosen, "best-by": own.best_by or "eval_loss"})
    pruning = decide(run, options, incomplete=own.incomplete)
    if options.keep_best and len(pruning.unmeasured) == len(pruning.keep) + len(pruning.remove):
        metric, other = options.best_by, "train_loss" if options.best_by == "eval_loss" else "eval_loss"
        raise InputError(f"no checkpoint of {run.uri} has an {metric}: give --best-by {other}, or --keep-last N alone")
    removed, done = ("would remove", "would be freed") if own.dry_run else ("removed", "freed")
    rows = []

    def row(state: str, one: StoredCheckpoint, why: str = "") -> None:
        rows.append([state, one.place.uri, words.size(one.bytes), why])

    try:
        for one in [*pruning.remove, *pruning.sweep]:
            if not own.dry_run:
                carry_out(one)
            row(removed, one, "" if one.complete else "incomplete")
        for one in pruning.keep:
            row("kept", one)
        for one, why in pruning.leave:
            row("left", one, f"INCOMPLETE: {why}")
    finally:  # what is gone is said, also where the next one could not be removed
        if rows:
            print_table(["", "CHECKPOINT", "SIZE", ""], rows)
    freed = sum(one.bytes for one in [*pruning.remove, *pruning.sweep])
    print(f"{words.size(freed)} {done}")
