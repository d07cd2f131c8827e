"""`llmft plan`: what `llmft run` with the same flags would do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from llmft_core.cli.flags import read_flags
from llmft_core.cli.quiet import quiet


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError. Prints the head of the run and the resolved plan as YAML, or all of it
    as JSON (`--json`)."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--json", action="store_true")
    own, rest = early.parse_known_args(list(argv))
    given = read_flags(rest, environ, folder, "llmft plan")
    if given.help:
        given.parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        given.parser.print_help()
        return 0
    plan = given.plan()
    if not given.debug:
        quiet()
    import yaml

    from llmft_core.head import head, rates, warnings
    from llmft_core.prepare import make_ready
    from llmft_core.report.live import LiveView

    ready = make_ready(plan, given.catalog, debug=given.debug, say=lambda text: None)
    resolved = {**ready.plan.to_json(), "name": plan.name}  # a generated one is taken once the plan has run
    strategy = given.catalog.create("strategy", ready.plan.strategy or {})
    configuration = strategy.configuration(ready.placement)
    if own.json:
        described = {
            "plan": resolved,
            "strategy_configuration": configuration,
            "total_steps": ready.job.total_steps,
            "steps_per_epoch": ready.job.steps_per_epoch,
            "padding": ready.padding,
            "first_epoch": asdict(ready.first_epoch),
            "learning_rates": rates(ready),
            "rows": {name: asdict(split) for name, split in ready.data.report.splits.items()},
            "parameters": {
                "trained": ready.share.trained,
                "frozen": ready.size.parameters if ready.share.adapter else ready.size.parameters - ready.share.trained,
            },
            "checkpoint_bytes": ready.checkpoint_bytes,
            "writes": (ready.places.runs() / ready.plan.name).uri,
            "warnings": warnings(ready),
        }
        print(json.dumps(described, indent=2))
        return 0
    view = LiveView(ready.job.total_steps, 1)
    for label, text in head(ready):
        view.say(f"{label:>12}  {text}")
    for text in warnings(ready):
        view.warn(text)
    view.say("\n# the plan, as --plan FILE takes it")
    view.say(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip())
    if configuration:
        view.say(f"\n# what {strategy.name} is given")
        view.say(yaml.safe_dump(configuration, sort_keys=False).rstrip())
    return 0
