"""`llmft verify-resume`: whether a plan, killed and gone on with, gives the same bits."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmft_core.cli.flags import read_beside
from llmft_core.cli.quiet import quiet
from llmft_core.errors import InputError

PROG = "llmft verify-resume"
STANDARD_STEPS = 6


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code: 0 exact, 1 not; raises LlmftError."""
    read = read_beside(add_own_flags, argv, environ, folder, PROG)
    if read is None:
        return 0
    own, given = read
    plan = given.plan()
    if not own.steps.isdigit() or int(own.steps) < 2:
        raise InputError(f"--steps {own.steps}: at least 2 optimizer steps, one before the state and one after it")
    if not given.debug:
        quiet()
    from llmft_core.storage.places import Places
    from llmft_core.verify_resume import verify_resume

    places = Places(given.catalog, plan.storage, plan.backends)
    verdict = verify_resume(plan, places, int(own.steps), lambda text: print(f"… {text}", flush=True))
    for line in verdict.lines():
        print(line)
    return 0 if verdict.exact else 1


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """What is not a plan's."""
    parser.description = (
        "Runs the plan of these flags (those of `llmft run`) in miniature, straight and killed and resumed, in its own "
        "storage and on its own cluster, and compares losses and weights bit by bit. Both runs are removed again."
    )
    parser.add_argument(
        "--steps",
        default=str(STANDARD_STEPS),
        metavar="N",
        help=f"optimizer steps of each run; the state is taken after half of them [{STANDARD_STEPS}]",
    )
