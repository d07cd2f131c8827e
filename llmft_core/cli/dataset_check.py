"""`llmft dataset check`: what `llmft run` with the same flags would say of the rows, and nothing else."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmft_core.cli.flags import Given, read_beside
from llmft_core.cli.quiet import quiet
from llmft_core.data.faults import BadRows
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.plan import RunPlan

PROG = "llmft dataset check"
NOT_CHECKED = "not checked without a tokenizer: lengths, what is trained of each row, the format's tokens as ids"


@dataclass
class Account:
    """What is said of the rows. `refusal`: why a run would not take them."""

    lines: list[str] = field(default_factory=list)
    splits: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bad_rows: BadRows | None = None
    quarantine: Path | None = None
    refusal: InputError | None = None


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns 0 where all rows can be used as the plan wants, warnings or not; raises InputError where not, after the
    account has been printed."""
    read = read_beside(add_own_flags, argv, environ, folder, PROG)
    if read is None:
        return 0
    own, given = read
    plan = given.plan()
    if not given.debug:
        quiet()
    account = Account()
    try:
        if own.no_tokenizer:
            without_tokenizer(plan, given, account)
        else:
            with_tokenizer(plan, given, account)
    except InputError as error:
        account.refusal = error
    if own.out and account.quarantine is not None and account.quarantine.exists():
        account.lines.append(f"copied to {copied(account.quarantine, Path(own.out))}")
    if own.json:
        print(json.dumps(described(account), indent=2, ensure_ascii=False))
        return InputError.exit_code if account.refusal else 0
    show(account)
    if account.refusal is not None:
        raise account.refusal
    return 0


def with_tokenizer(plan: RunPlan, given: Given, account: Account) -> None:
    """All that a run checks. The tables stay in the cache: the run will not make them again. Raises InputError."""
    from llmft_core.data.prepare import refuse
    from llmft_core.head import rows_text
    from llmft_core.prepare import prepare_data
    from llmft_core.storage.places import Places

    # Nothing is refused until everything has been seen.
    lenient = {"on_bad_row": "quarantine", "max_bad_rows": 1.0, "max_dropped": 1.0}
    all_rows = plan.model_copy(update={"data": plan.data.model_copy(update=lenient)})
    places = Places(given.catalog, plan.storage, plan.backends)
    try:
        data = prepare_data(all_rows, given.catalog, places, say=lambda text: None).data
    except Problems as error:
        if any(problem.path.startswith("model") for problem in error.problems):
            way_out = Problem("", "`--no-tokenizer` checks what can be known of the rows without a model")
            raise Problems([*error.problems, way_out], error.heading) from error
        raise
    for name, split in data.report.splits.items():
        account.splits[name] = asdict(split)
        account.lines += [f"{name:>6}  {split.source}", f"{'':8}{rows_text(split, plan.context_length)}"]
    account.warnings = [str(finding) for finding in data.report.findings()]
    account.bad_rows, account.quarantine = data.report.bad_rows, data.quarantine
    refuse(data, plan)


def without_tokenizer(plan: RunPlan, given: Given, account: Account) -> None:
    """What can be known before there is a model. Raises InputError."""
    from llmft_core.data.formats import open_dataset
    from llmft_core.data.prepare import quarantine_file
    from llmft_core.data.scan import scan
    from llmft_core.report import words
    from llmft_core.storage.places import Places
    from llmft_core.weights.cache import cache_folder

    dataset, sources = open_dataset(given.catalog, plan, Places(given.catalog, plan.storage, plan.backends))
    names = [file.name for source in sources.values() for file in source.files]
    quarantine = quarantine_file(cache_folder(), sha256("\n".join(names).encode()).hexdigest())
    found = scan(dataset, sources, quarantine)
    for name, (read, bad) in found.splits.items():
        account.splits[name] = {"source": sources[name].name, "files": names, "rows_read": read, "bad": bad}
        usable = f"{words.count(read - bad)} of {words.counted(read, 'row')} can be parsed"
        account.lines += [f"{name:>6}  {sources[name].name}", f"{'':8}{usable}"]
    account.warnings = [*map(str, found.findings), NOT_CHECKED]
    account.bad_rows, account.quarantine = found.bad_rows, quarantine
    found.bad_rows.refuse(found.splits, plan.data, quarantine)


def show(account: Account) -> None:
    """The account on standard output; the bad rows where a run would put up with them, for else they are errors."""
    for line in account.lines:
        print(line)
    for text in account.warnings:
        print(f"warning: {text}")
    if account.refusal is not None:
        return
    if account.bad_rows and account.bad_rows.total and account.quarantine:
        for problem in account.bad_rows.lines(account.quarantine):
            print(f"set aside: {problem}")
    print("ok: `llmft run` takes these rows")


def described(account: Account) -> dict[str, Any]:
    """The account as JSON data."""
    bad, error = account.bad_rows or BadRows(), account.refusal
    heading = [error.heading] if isinstance(error, Problems) and error.heading else []
    problems = error.problems if isinstance(error, Problems) else [error] if error else []
    return {
        "ok": error is None,
        "splits": account.splits,
        "warnings": account.warnings,
        "bad_rows": {**asdict(bad), "total": bad.total},
        "quarantine": str(account.quarantine) if bad.total else None,
        "problems": [*heading, *map(str, problems)],
    }


def copied(quarantine: Path, folder: Path) -> Path:
    """The quarantine file in a folder of the user's. Raises InputError where it cannot be written."""
    target = folder / "quarantine" / quarantine.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(quarantine, target)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot write {target}: {error.strerror or error}") from error
    return target


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """What is not a plan's."""
    group = parser.add_argument_group("checking")
    group.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    group.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="without a model: check what needs none, and say what was not checked",
    )
    group.add_argument(
        "--out", default="", metavar="FOLDER", help="put a copy of the rows that cannot be used into FOLDER/quarantine"
    )
