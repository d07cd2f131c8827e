"""What commands share that are given a URI rather than a plan: `generate`, `checkpoint` and `weights`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.catalog import Catalog
from llmft_core.cli.flags import Parser, add_backend_flags, read_flags
from llmft_core.cli.run import quiet
from llmft_core.plan import Layer, RunPlan
from llmft_core.plan_sources import set_path

if TYPE_CHECKING:
    from llmft_core.storage.places import Places


@dataclass(frozen=True)
class Reached:
    """What a command works with."""

    own: argparse.Namespace
    plan: RunPlan
    catalog: Catalog
    places: Places


def reach(
    parser: Parser,
    argv: Sequence[str],
    environ: Mapping[str, str],
    folder: Path,
    check: Callable[[argparse.Namespace], str | None],
) -> tuple[argparse.Namespace, Places] | None:
    """As `reach_plan`, for commands that need no more than places."""
    reached = reach_plan(parser, argv, environ, folder, check)
    return None if reached is None else (reached.own, reached.places)


def reach_plan(
    parser: Parser,
    argv: Sequence[str],
    environ: Mapping[str, str],
    folder: Path,
    check: Callable[[argparse.Namespace], str | None],
) -> Reached | None:
    """Parse a command's own flags with those that say how a URI is reached (`--backends.NAME.OPTION`, `llmft.yaml`,
    the environment); None after `--help`. `check` raises InputError for its own flags before storage is looked at, and
    returns the model that the plan is to name, or nothing. A flag whose dest is a path of the plan belongs to it."""
    parser.add_argument("-h", "--help", action="store_true", help="show this help and leave")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the logs of all libraries")
    parser.add_argument("--disable-plugin", action="append", metavar="NAME", help="do not load this plugin; repeatable")
    early, _ = parser.parse_known_intermixed_args(list(argv))
    disabled = [f"--disable-plugin={name}" for name in early.disable_plugin or []]
    given = read_flags(disabled, environ, folder, parser.prog)
    add_backend_flags(parser, given.catalog)
    own = parser.parse_intermixed_args(list(argv))  # words may stand before, between and after flags
    if own.help:
        parser.print_help()
        return None
    model = check(own)
    flags: dict[str, Any] = {"model": {"name": model}} if model else {}
    for path, value in vars(own).items():
        if "." in path:
            set_path(flags, path, value)
    plan = replace(given, layers=(*given.layers, Layer("flags", flags))).plan()
    if not own.debug:
        quiet()
    from llmft_core.storage.places import Places

    return Reached(own, plan, given.catalog, Places(given.catalog, plan.storage, plan.backends))
