"""`llmft resume URI`: go on with a run from its newest complete state, here or on other machines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.cli.flags import Given, Parser, read_flags
from llmft_core.cli.quiet import quiet
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.plan import RunPlan
from llmft_core.plan_layers import Layer, resolve_backends

if TYPE_CHECKING:
    from llmft_core.resume import Point

PROG = "llmft resume"
EXAMPLE = f"`{PROG} s3://BUCKET/runs/NAME`"


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    own, rest = own_parser().parse_known_args(list(argv))
    words = [word for word in rest[:1] if not word.startswith("-")]
    reaching = read_flags(rest[len(words) :], environ, folder, PROG)
    if reaching.help:
        print_help(reaching.parser)
        return 0
    if not words:
        raise InputError(f"no run is given: write its folder or URI, or that of one of its states, first: {EXAMPLE}")
    if not reaching.debug:
        quiet()
    from llmft_core.resume import changes, find_point
    from llmft_core.storage.places import Places

    backends = resolve_backends(reaching.layers, reaching.catalog)
    point = find_point(Places(reaching.catalog, None, backends).place(words[0]))
    given = read_flags(rest[1:], {}, folder, PROG, saved=Layer("the run's plan", point.plan))
    plan = resumed_plan(given, point.plan)
    target = Places(given.catalog, plan.storage, plan.backends).runs() / plan.name
    if target.uri != point.run.uri:
        raise InputError(
            f"{point.run.uri} is not where the run's plan writes ({target.uri}): say where it is now, with --storage.…"
        )
    changed = changes(point.plan, plan.to_json())
    if changed and not own.allow_changes:
        problems = [Problem("", line) for line in changed]
        raise Problems(problems, "the run would go on as another one; leave these as they were, or --allow-changes:")
    return go_on(plan, given, point, changed=bool(changed))


def go_on(plan: RunPlan, given: Given, point: Point, *, changed: bool = False) -> int:
    """Train what is left of a run. `changed`: by a plan that may have more steps than it was begun with. Returns the
    exit code; raises LlmftError."""
    from llmft_core.report.summary import summary
    from llmft_core.resume import finished, once_abandoned
    from llmft_core.run import run

    if not changed and (last := finished(point, point.described["total_steps"])):
        print(
            f"the run is complete: {last} is the checkpoint of its last optimizer step; there is nothing left to do "
            "(`llmft resume` trains its end again from a state_NNNNN that is named)"
        )
        return 0
    point = once_abandoned(point, lambda text: print(f"… {text}", flush=True))
    outcome = run(plan, given.catalog, debug=given.debug, point=point)
    for line in summary(outcome):
        print(line)
    return 0


def own_parser() -> Parser:
    """What is not a plan's."""
    parser = Parser(prog=PROG)
    parser.add_argument("--allow-changes", action="store_true", help="go on although the plan is another one")
    return parser


def print_help(flags: argparse.ArgumentParser) -> None:
    """The flags are those of `llmft run`."""
    flags.usage = f"{PROG} RUN [flags]"
    flags.description = (
        "Go on with a run, from the newest complete state in its folder (or from the state that is named), with the "
        "plan it was started with; neither llmft.yaml nor the environment changes it. Workers, strategy, micro-batch, "
        "checkpoints, states and trackers may be given anew; anything else only with --allow-changes."
    )
    flags.add_argument("--allow-changes", action="store_true", help="go on although the plan is another one")
    flags.print_help()


def resumed_plan(given: Given, saved: Mapping[str, Any]) -> RunPlan:
    """The saved plan under the flags of this command line. Raises Problems."""
    *files, flags = given.layers
    data = dict(flags.data)
    # How the run was reached is how it is written; a plan says that in one place only.
    backends = dict(data.get("backends", {}))
    reached = backends.pop(saved["storage"]["name"], {})
    if reached:
        data["storage"] = {**reached, **data.get("storage", {})}
        data["backends"] = backends
    data.setdefault("micro-batch", None)  # the old one where it fits: see `placing.place`
    return Given((*files, Layer("flags", data)), given.catalog, given.problems, given.parser, given.debug, False).plan()
