"""What commands share that are given a URI rather than a plan: `generate` and `checkpoint`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.cli.flags import Parser, add_backend_flags, read_flags
from llmft_core.cli.run import quiet
from llmft_core.plan import Layer, resolve_backends
from llmft_core.plan_sources import set_path

if TYPE_CHECKING:
    from llmft_core.storage.places import Places


def reach(
    parser: Parser,
    argv: Sequence[str],
    environ: Mapping[str, str],
    folder: Path,
    check: Callable[[argparse.Namespace], None],
) -> tuple[argparse.Namespace, Places] | None:
    """Parse a command's own flags with those that say how a URI is reached (`--backends.NAME.OPTION`, `llmft.yaml`,
    the environment); None after `--help`. `check` raises InputError for its own flags before storage is looked at."""
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
        if path.startswith("backends."):
            set_path(flags, path, value)
    # Only what is said of storage: the rest of llmft.yaml is about runs, and need not be whole.
    backends = resolve_backends((*given.layers, Layer("flags", flags)), given.catalog)
    if not own.debug:
        quiet()
    from llmft_core.storage.places import Places

    return own, Places(given.catalog, None, backends)
