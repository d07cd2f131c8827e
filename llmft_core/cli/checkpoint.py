"""`llmft checkpoint list|show|verify|pull|push|prune`: checkpoints in storage."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.cli import checkpoint_write
from llmft_core.cli.describe import print_table
from llmft_core.cli.flags import Parser
from llmft_core.cli.reach import add_base_flag, reach_more
from llmft_core.errors import InputError, LlmftError

if TYPE_CHECKING:
    from llmft_core.storage.places import Place

PROG = "llmft checkpoint"
ACTIONS = {
    "list": "the checkpoints below a run or a root: complete or not, bytes, step, losses",
    "show": "metrics, plan and provenance of a checkpoint",
    "verify": "read every byte of a checkpoint and hold it against its manifest",
    "pull": "fetch a checkpoint into a new folder, verified",
    "push": "upload a local folder (pulled, or kept by a run whose upload failed) as a complete checkpoint",
    "merge": "write an adapter and its base model as one whole checkpoint, to serve without peft",
    "prune": "remove checkpoints of a finished run, but the newest and the best",
}


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    parser = Parser(
        prog=PROG,
        usage=f"{PROG} ACTION FOLDER-OR-URI [TARGET] [flags]",
        description="; ".join(f"{name}: {text}" for name, text in ACTIONS.items()),
    )
    parser.add_argument("action", nargs="?", metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument("place", nargs="?", metavar="FOLDER-OR-URI", help="a checkpoint; for `list` a run or a root")
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help="for `pull` the new local folder, for `push` a folder in storage"
    )
    parser.add_argument("--out", metavar="FOLDER-OR-URI", help="for `merge`: where the whole checkpoint goes")
    add_base_flag(parser, "for `merge`: ")
    parser.add_argument("--json", action="store_true", help="for `list` and `show`: print JSON and nothing else")
    checkpoint_write.add_flags(parser)
    reached = reach_more(parser, argv, environ, folder, check_flags)
    if reached is None:
        return 0
    own, places = reached.own, reached.places
    place = places.place(own.place)
    if own.action == "list":
        return show_list(place, own)
    if own.action == "push":
        checkpoint_write.push(own, place, places.place(own.target))
        return 0
    if own.action == "prune":
        checkpoint_write.prune(own, place)
        return 0
    if own.action == "merge":
        checkpoint_write.merge(reached, place)
        return 0
    from llmft_core.checkpoint.stored import pull, read_manifest, verify_stored
    from llmft_core.report import words

    if own.action == "show":
        return show(read_manifest(place), own)
    if own.action == "pull":
        size = pull(place, Path(own.target))
        print(f"{own.target}: {words.size(size)}, verified")
        return 0
    size, wrong = verify_stored(place)
    if wrong:
        raise LlmftError(f"{place.uri} is damaged: {'; '.join(wrong)}: do not serve it")
    print(f"{place.uri}: {words.size(size)} read, all as the manifest says")
    return 0


def check_flags(own: argparse.Namespace) -> None:
    """Raises InputError."""
    if own.action not in ACTIONS:
        given = f"no action is called {own.action}" if own.action else "no action is given"
        raise InputError(f"{given}; there are {', '.join(ACTIONS)}: {PROG} list ./llmft-runs")
    if not own.place:
        raise InputError(f"{PROG} {own.action} needs a folder or URI")
    if own.action == "push" and (not own.target or "://" in own.place):
        raise InputError(f"{PROG} push FOLDER TARGET: push needs a local folder, and where in storage it goes")
    if (own.action == "merge") != bool(own.out):
        raise InputError(f"{PROG} merge CHECKPOINT --out FOLDER-OR-URI: merge needs --out, the others take none")
    if own.base and own.action != "merge":
        raise InputError(f"--base belongs to `{PROG} merge`, not to {own.action}")
    if own.action != "push" and (own.action == "pull") != bool(own.target):
        raise InputError(f"{PROG} pull CHECKPOINT FOLDER: pull needs a new folder, the others but push take none")
    checkpoint_write.check_flags(own)


def show_list(place: Place, own: argparse.Namespace) -> int:
    """One line a checkpoint; incomplete ones are shown as such, and nothing else reads them."""
    from llmft_core.checkpoint.stored import list_checkpoints, read_manifest
    from llmft_core.report import words

    rows: list[dict[str, Any]] = []
    for found in list_checkpoints(place):
        manifest = read_manifest(found.place) if found.complete else {}
        facts = {"complete": found.complete, "bytes": found.bytes, "step": manifest.get("step")}
        rows.append({"uri": found.place.uri, **facts, "metrics": manifest.get("metrics", {})})
    if own.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        raise InputError(f"{place.uri} holds no checkpoints: give a run's folder, or the root under which `runs` lies")
    table = []
    for row in rows:
        losses = [
            f"{row['metrics'][name]:.4f}" if name in row["metrics"] else "-" for name in ("train/loss", "eval/loss")
        ]
        state = "complete" if row["complete"] else "INCOMPLETE"
        step = "-" if row["step"] is None else str(row["step"])
        table.append([row["uri"], state, words.size(row["bytes"]), step, *losses])
    print_table(["CHECKPOINT", "STATE", "SIZE", "STEP", "TRAIN LOSS", "EVAL LOSS"], table)
    return 0


def show(manifest: dict[str, Any], own: argparse.Namespace) -> int:
    """The manifest, for people as YAML."""
    if own.json:
        print(json.dumps(manifest, indent=2))
        return 0
    import yaml

    short = {**manifest, "files": {name: described["bytes"] for name, described in manifest["files"].items()}}
    print(yaml.safe_dump(short, sort_keys=False, allow_unicode=True).rstrip())
    return 0
