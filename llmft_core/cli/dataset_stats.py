"""`llmft dataset stats`: lengths, padding and vocabulary, to choose context length, packing and global batch by."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llmft_core.cli.dataset_rows import check_target, rows_of, write
from llmft_core.cli.flags import Given, read_beside
from llmft_core.plan import RunPlan

if TYPE_CHECKING:
    from llmft_core.report.statistics import Shown

PROG = "llmft dataset stats"
NO_LIMIT = 2**30
"""Tokens: longer than any row."""


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    read = read_beside(add_own_flags, argv, environ, folder, PROG)
    if read is None:
        return 0
    own, given = read
    check_target("--html", own.html)
    check_target("--svg", own.svg)
    plan = given.plan()
    from rich.console import Console

    from llmft_core.report.statistics import statistics_lines
    from llmft_core.report.statistics_html import picture, statistics_page

    shown = figures(plan, given)
    if own.json:
        print(json.dumps(asdict(shown), indent=2, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        for line in statistics_lines(shown, console.width):
            console.print(line, markup=False, soft_wrap=True)
    if own.html:
        write("--html", own.html, statistics_page(shown, f"Dataset {plan.dataset['name']}"))
    if own.svg:
        write("--svg", own.svg, picture("train", shown.splits["train"], shown))
    return 0


def figures(plan: RunPlan, given: Given) -> Shown:
    """The figures of all splits, of rows of any length. Raises Problems."""
    from llmft_core.data.order import mix_of
    from llmft_core.data.statistics import split_statistics
    from llmft_core.placing import likely_micro_batch
    from llmft_core.report.statistics import Shown

    micro_batch = likely_micro_batch(plan)
    # Nothing is dropped, so that other context lengths can be judged; these tables serve any --context-length.
    data = plan.data.model_copy(update={"on_long": "drop"})
    material = rows_of(plan.model_copy(update={"context_length": NO_LIMIT, "data": data}), given)
    mixes = {"train": mix_of(material.data), "test": None}
    tables = {"train": material.data.train, "test": material.data.test}
    return Shown(
        splits={
            name: split_statistics(table, report.source, material.tokenizer, plan, micro_batch, mixes[name])
            for name, report in material.data.report.splits.items()
            if (table := tables[name]) is not None
        },
        tokenizer=plan.model.tokenizer or plan.model.name,
        context=plan.context_length,
        global_batch=plan.global_batch,
        micro_batch=micro_batch,
    )


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """What is not a plan's."""
    group = parser.add_argument_group("what is shown")
    group.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    group.add_argument("--html", default="", metavar="FILE", help="write a page too")
    group.add_argument(
        "--svg", default="", metavar="FILE", help="write the histogram of the training rows as a picture"
    )
