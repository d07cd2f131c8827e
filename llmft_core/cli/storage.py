"""`llmft storage check`: whether a run's storage can do what runs need, and how fast."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from llmft_core.cli.flags import Parser, add_program_flags, add_storage_flags, read_flags
from llmft_core.cli.quiet import quiet
from llmft_core.errors import InputError, Problems, close_match
from llmft_core.plan_layers import merge, resolve_storage

if TYPE_CHECKING:
    from llmft_core.storage.check_storage import Finding
    from llmft_core.storage.places import Place

PROG = "llmft storage"
STANDARD_SIZE = 64  # MiB
MOST = 100 * 1024  # MiB; more is a slip of the finger
EXAMPLE = f"`{PROG} check --storage s3 --storage.bucket BUCKET`"


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code: 0 fine, 1 something is wrong or missing; raises LlmftError, InputError for wrong flags."""
    own, rest = own_parser().parse_known_args(list(argv))
    given = read_flags(rest, environ, folder, PROG)
    choices, _ = merge(given.layers)
    if given.help:
        parser = own_parser()
        add_program_flags(parser)
        add_storage_flags(parser, given.catalog, choices)
        parser.print_help()
        return 0
    check_flags(own)
    if given.problems:
        raise Problems(given.problems)
    # The flags are those of `llmft run`, and only what they say of storage is looked at: the rest need not be whole.
    storage = resolve_storage(given.layers, given.catalog)
    if not given.debug:
        quiet()
    from llmft_core.storage.places import Places

    return check(Places(given.catalog, storage, {}).runs(), own.size * 2**20)


def own_parser() -> Parser:
    """What is not a plan's."""
    parser = Parser(
        prog=PROG,
        usage=f"{PROG} check --storage NAME [--storage.OPTION VALUE] [--size MIB]",
        description="Write, read, list and delete probes below the run folder; whether two writers are kept apart; "
        "latency, throughput, clock. Takes the flags of `llmft run`. Exit code 0: fine, 1: something is wrong.",
    )
    parser.add_argument("action", nargs="?", metavar="ACTION", help="check")
    parser.add_argument(
        "--size",
        metavar="MIB",
        type=int,
        default=STANDARD_SIZE,
        help=f"measure the throughput by a file of so many MiB; 0: do not [{STANDARD_SIZE}]",
    )
    return parser


def check_flags(own: argparse.Namespace) -> None:
    """Raises InputError."""
    if own.action != "check":
        close = close_match(own.action or "", ["check"])
        raise InputError(
            f"{f'no action is called {own.action}{close}' if own.action else 'no action is given'}; "
            f"there is check: {EXAMPLE}"
        )
    if not 0 <= own.size <= MOST:
        raise InputError(f"--size {own.size}: give MiB from 1 to {MOST}, or 0 to leave the throughput out")


def check(runs: Place, size: int) -> int:
    """Prints each finding as it is known. `size` in bytes."""
    from llmft_core.report.transfers import transfer_bar
    from llmft_core.storage.check_storage import examine

    print(f"{runs.uri} (storage {runs.backend.name})")
    states = []
    with ExitStack() as bars:

        def progress(what: str) -> Callable[[int, int], None]:
            bars.close()  # the one before
            return bars.enter_context(transfer_bar(what))

        with closing(examine(runs, size, progress)) as findings:
            for finding in findings:
                bars.close()
                show(finding)
                states.append(finding.state)
    wrong, notes = states.count("wrong"), states.count("note")
    if wrong:
        print(f"not fit for runs: {wrong} wrong, {notes} to note; docs/storage.md says which permissions are needed")
        return 1
    print("fit for runs" + (f", {notes} to note" if notes else ""))
    return 0


def show(finding: Finding) -> None:
    """One line."""
    print(f"{finding.state:<8} {finding.what:<10} {' '.join(finding.message.split())}", flush=True)
