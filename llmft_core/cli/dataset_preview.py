"""`llmft dataset preview`: rows exactly as the model sees them, token by token."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from llmft_core.cli.dataset_rows import check_target, rows_of, write
from llmft_core.cli.flags import read_beside
from llmft_core.errors import InputError
from llmft_core.views import Pick

PROG = "llmft dataset preview"


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    read = read_beside(add_own_flags, argv, environ, folder, PROG)
    if read is None:
        return 0
    own, given = read
    if own.rows < 1:
        raise InputError(f"--rows {own.rows}: show at least 1 row")
    check_target("--html", own.html)
    plan = given.plan()
    from rich.console import Console

    from llmft_core.data.order import Order, mix_of
    from llmft_core.data.preview import Speller, batch_view, find_row, picked_rows, row_view
    from llmft_core.placing import likely_micro_batch
    from llmft_core.report.rows_html import rows_page
    from llmft_core.report.rows_text import print_rows

    micro_batch = likely_micro_batch(plan)
    material = rows_of(plan, given)
    table = material.data.train if own.split == "train" else material.data.test
    if table is None:
        raise InputError(
            "--split test: there are only training rows; give test rows with --dataset.test FILE, or keep some with "
            "--data.validation-fraction"
        )
    if own.row:
        report = material.data.report.splits[own.split]
        numbers = [find_row(table, wanted, report.files, report.dropped_origins) for wanted in own.row]
    else:
        numbers = picked_rows(table, own.pick, own.rows, plan.seed)
    speller = Speller(material.tokenizer)
    rows = [row_view(table, number, speller) for number in numbers]
    print_rows(Console(highlight=False), rows, ids=own.ids)
    if own.html:
        batch = None
        if own.split == "train":
            batch = batch_view(table, Order.of(table, plan, mix_of(material.data)), plan, micro_batch)
        title = f"{material.dataset.name}, {own.split} split, as {plan.model.name} sees it"
        write("--html", own.html, rows_page(title, rows, batch, ids=own.ids))
        print(f"\nwrote {own.html}")
    return 0


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """What is not a plan's."""
    group = parser.add_argument_group("what is shown")
    group.add_argument("--split", choices=("train", "test"), default="train", help="rows of this split [train]")
    group.add_argument("--rows", type=int, default=5, metavar="N", help="so many rows [5]")
    group.add_argument("--pick", choices=get_args(Pick), default="first", help="which rows [first]; random by --seed")
    group.add_argument(
        "--row", action="append", metavar="ROW", help="this row: FILE:LINE, or its number from 1; repeatable"
    )
    group.add_argument("--ids", action="store_true", help="every token's id below it")
    group.add_argument("--html", default="", metavar="FILE", help="write a page too, with the layout of a micro-batch")
