"""What commands share that are given a URI rather than a plan: `generate`, `checkpoint` and `weights`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.catalog import Catalog
from llmft_core.cli.flags import Parser, add_backend_flags, read_flags
from llmft_core.cli.quiet import quiet
from llmft_core.errors import Problem, Problems
from llmft_core.plan import RunPlan
from llmft_core.plan_layers import Layer, resolve, resolve_backends
from llmft_core.plan_sources import set_path

if TYPE_CHECKING:
    from llmft_core.storage.places import Places


@dataclass(frozen=True)
class Reached:
    """What a command works with."""

    own: argparse.Namespace
    catalog: Catalog
    places: Places
    layers: tuple[Layer, ...]
    problems: tuple[Problem, ...]

    def plan(self, model: str) -> RunPlan:
        """A plan of what flags, environment and `llmft.yaml` say of weights, and of this model; nothing else of them
        is looked at. Raises Problems, with variables that set nothing."""
        only = [Layer(layer.source, {k: v for k, v in layer.data.items() if k == "weights"}) for layer in self.layers]
        if self.problems:
            raise Problems(self.problems)
        return resolve([*only, Layer("flags", {"model": {"name": model}})], self.catalog)


def add_base_flag(parser: Parser, prefix: str = "") -> None:
    """`--base`, for commands that read adapters."""
    parser.add_argument(
        "--base",
        default="",
        metavar="MODEL",
        help=f"{prefix}the adapter's base model: name, hub id, folder or URI [as its run named it]",
    )


def reach(
    parser: Parser,
    argv: Sequence[str],
    environ: Mapping[str, str],
    folder: Path,
    check: Callable[[argparse.Namespace], None],
) -> tuple[argparse.Namespace, Places] | None:
    """As `reach_more`, for commands that need no more than places."""
    reached = reach_more(parser, argv, environ, folder, check)
    return None if reached is None else (reached.own, reached.places)


def reach_more(
    parser: Parser,
    argv: Sequence[str],
    environ: Mapping[str, str],
    folder: Path,
    check: Callable[[argparse.Namespace], None],
) -> Reached | None:
    """Parse a command's own flags with those that say how a URI is reached (`--backends.NAME.OPTION`, `llmft.yaml`,
    the environment); None after `--help`. `check` raises InputError for its own flags before storage is looked at. A
    flag whose dest is a dotted path belongs to the plan."""
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
    check(own)
    flags: dict[str, Any] = {}
    for path, value in vars(own).items():
        if "." in path:
            set_path(flags, path, value)
    # Only what is said of storage: the rest of llmft.yaml is about runs, and need not be whole.
    layers = (*given.layers, Layer("flags", flags))
    backends = resolve_backends(layers, given.catalog)
    if not own.debug:
        quiet()
    from llmft_core.storage.places import Places

    return Reached(own, given.catalog, Places(given.catalog, None, backends), layers, given.problems)
