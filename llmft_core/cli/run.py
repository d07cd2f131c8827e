"""`llmft run`: train."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmft_core.catalog import Catalog
from llmft_core.cli import resume
from llmft_core.cli.flags import Parser, read_flags
from llmft_core.cli.quiet import quiet
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.plan import RunPlan
from llmft_core.plan_layers import family_of_name

if TYPE_CHECKING:
    from llmft_core.resume import Point

PROG = "llmft run"


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    early = Parser(prog=PROG)
    add_own_flags(early)
    own, rest = early.parse_known_args(list(argv))
    if own.resume not in ("", "auto"):
        return resume.run_command([own.resume, *rest], environ, folder)
    given = read_flags(rest, environ, folder, PROG)
    if given.help:
        add_own_flags(given.parser)
        given.parser.print_help()
        return 0
    plan = given.plan()
    if not given.debug:
        quiet()
    from llmft_core.report.summary import summary
    from llmft_core.run import run

    if own.resume:
        point = find_or_free(plan, given.catalog)
        if point is not None:
            return resume.go_on(as_begun(plan, point, given.catalog), given, point)
    outcome = run(plan, given.catalog, debug=given.debug)
    for line in summary(outcome):
        print(line)
    return 0


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """What is not a plan's."""
    parser.add_argument(
        "--resume",
        default="",
        metavar="auto|URI",
        help="auto: go on with the run of this --name, or begin it where it is not there (a job that is started again "
        "by its scheduler); URI: as `llmft resume URI`",
    )


def find_or_free(plan: RunPlan, catalog: Catalog) -> Point | None:
    """Where the run of the plan's name goes on; None where it was never begun and nobody is about to begin it. Raises
    InputError."""
    from llmft_core.resume import find_begun
    from llmft_core.storage.lease import clear, wait_for_a_sign
    from llmft_core.storage.places import Places

    if not plan.name:
        raise InputError("resume: auto goes on with the run of a name: give --name NAME, the same one each time")
    run = Places(catalog, plan.storage, plan.backends).runs() / plan.name
    point = find_begun(run)
    if point is not None:
        return point
    # Whoever has a lease and no run was killed before it could begin, or is about to.
    dead = wait_for_a_sign(run, lambda text: print(f"… {text}", flush=True))
    if dead is not None:
        clear(run, dead)
    return find_begun(run)


def as_begun(plan: RunPlan, point: Point, catalog: Catalog) -> RunPlan:
    """The plan with what the run has decided. Raises Problems where it was begun with another one."""
    from llmft_core.placing import absolute_folder
    from llmft_core.resume import changes, decided

    if not family_of_name(plan.model.name, catalog):
        plan = plan.model_copy(update={"model": absolute_folder(plan.model)})
    plan = RunPlan.from_json(decided(plan.to_json(), point.plan))
    changed = changes(point.plan, plan.to_json())
    if changed:
        problems = [Problem("", line) for line in changed]
        raise Problems(problems, f"{point.run.uri} was begun with another plan; give what it had, or another --name:")
    return plan
