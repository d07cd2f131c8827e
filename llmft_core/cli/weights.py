"""`llmft weights fetch|mirror|list|verify`: pretrained models in this node's cache and in mirrors."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmft_core.cli.describe import print_table
from llmft_core.cli.flags import Parser
from llmft_core.cli.reach import Reached, reach_more
from llmft_core.errors import InputError, LlmftError, close_match
from llmft_core.plan import WeightsOptions

if TYPE_CHECKING:
    from llmft_core.storage.places import Place

PROG = "llmft weights"
ACTIONS = {
    "fetch": "stage a model into this node's cache, as a run would",
    "mirror": "copy a model to a mirror, for all nodes and without the hub",
    "list": "the models in this node's cache, or in a mirror",
    "verify": "read every byte of a model again and hold it against its manifest",
}
USES = {  # action → (least, most) words after it, how it is called
    "fetch": (1, 1, f"{PROG} fetch MODEL"),
    "mirror": (2, 2, f"{PROG} mirror MODEL MIRROR"),
    "list": (0, 1, f"{PROG} list [MIRROR]"),
    "verify": (1, 1, f"{PROG} verify MODEL-FOLDER-OR-URI"),
}


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    parser = Parser(
        prog=PROG,
        usage=f"{PROG} ACTION [MODEL] [MIRROR] [flags]",
        description="; ".join(f"{name}: {text}" for name, text in ACTIONS.items()),
    )
    parser.add_argument("action", nargs="?", metavar="ACTION", help=", ".join(ACTIONS))
    what = "a model's short name, hub id, folder or URI; for `list` a mirror, or nothing: this node's cache"
    parser.add_argument("what", nargs="?", metavar="MODEL", help=what)
    parser.add_argument("target", nargs="?", metavar="MIRROR", help="for `mirror`: the folder or URI under which it is")
    parser.add_argument("--as", dest="name", metavar="NAME", help="for `mirror`: the hub id under which it is found")
    parser.add_argument("--json", action="store_true", help="for `list`: print JSON and nothing else")
    field = WeightsOptions.model_fields["mirror"]
    parser.add_argument(
        "--weights.mirror",
        dest="weights.mirror",
        metavar="URI",
        default=argparse.SUPPRESS,
        help=f"for `fetch`: {field.description}",
    )
    reached = reach_more(parser, argv, environ, folder, check_flags)
    if reached is None:
        return 0
    action = {"fetch": fetch, "mirror": mirror, "list": show_list, "verify": verify}[reached.own.action]
    action(reached)
    return 0


def check_flags(own: argparse.Namespace) -> None:
    """Raises InputError."""
    if own.action not in ACTIONS:
        close = close_match(own.action or "", ACTIONS)
        given = f"no action is called {own.action}{close}" if own.action else "no action is given"
        raise InputError(f"{given}; there are {', '.join(ACTIONS)}: `{PROG} --help`")
    words = [word for word in (own.what, own.target) if word]
    least, most, use = USES[own.action]
    if not least <= len(words) <= most:
        said = f"{len(words)} words were given" if words else "nothing was given"
        raise InputError(f"{said} for {own.action}: write `{use}`")
    for flag, given, action in (("--as", own.name, "mirror"), ("--json", own.json, "list")):
        if given and own.action != action:
            raise InputError(f"{flag} belongs to `{USES[action][2]}`, not to {own.action}")
    if own.action != "fetch" and hasattr(own, "weights.mirror"):
        raise InputError(f"--weights.mirror belongs to `{USES['fetch'][2]}`; name the mirror itself: `{use}`")


def fetch(reached: Reached) -> None:
    """Stage a model, and say where it lies and what it cost."""
    from llmft_core.report import words
    from llmft_core.report.transfers import transfer_bar
    from llmft_core.weights.cache import read_cache_manifest
    from llmft_core.weights.files import is_model_file
    from llmft_core.weights.stage import hub_repository, stage_model

    what = reached.own.what
    plan = reached.plan(what)
    repository = hub_repository(what, reached.catalog)
    from_hub = bool(repository) and not plan.weights.mirror
    if from_hub:
        say_hub(repository)
    moved = 0
    began = time.monotonic()
    with transfer_bar(f"fetching {what}") as bar:

        def progress(done: int, total: int) -> None:
            nonlocal moved
            moved = done
            bar(done, total)

        model = stage_model(plan, reached.catalog, reached.places, weights=True, progress=progress)
    seconds = time.monotonic() - began
    sizes = [path.stat().st_size for path in model.path.iterdir() if is_model_file(path.name)]
    if from_hub or not (repository or "://" in what):
        how = "in the hub's own cache" if from_hub else "on this node"
    elif not moved:
        how = "it was in the cache, nothing was fetched"
    elif read_cache_manifest(model.path).get("promised"):
        how = f"{words.size(moved)} fetched, every file as the source's manifest says"
    else:
        how = f"{words.size(moved)} fetched; the source has no manifest, so SHA-256 were noted as the files came"
    print(model.path)
    print(f"{words.size(sum(sizes))} in {len(sizes)} files, {words.duration(seconds)}: {how}")


def mirror(reached: Reached) -> None:
    """Copy a model to a mirror."""
    from llmft_core.report import words
    from llmft_core.report.transfers import transfer_bar
    from llmft_core.weights.held import name_of
    from llmft_core.weights.layout import folder_name, model_name
    from llmft_core.weights.publish import check_mirror, check_target, publish
    from llmft_core.weights.stage import hub_repository, stage_model

    what, catalog = reached.own.what, reached.catalog
    # from the hub itself: a mirror that the environment names may be the one that is to be filled
    plan = reached.plan(what).model_copy(update={"weights": WeightsOptions()})
    given = reached.own.name or what
    if not (name := hub_repository(given, catalog)):
        name = given
        if not reached.own.name and "://" in what:
            name = model_name(what.rstrip("/").rpartition("/")[2])
        elif not reached.own.name and Path(what).expanduser().is_dir():
            name = name_of(Path(what).expanduser())
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise InputError(f"{name!r} cannot be a model's name in a mirror: give one with --as OWNER/NAME")
    root = reached.places.place(reached.own.target)
    target = root / folder_name(name)
    check_mirror(root)
    check_target(target)
    began = time.monotonic()
    if repository := hub_repository(what, catalog):
        say_hub(repository)
    with transfer_bar(f"fetching {what}") as bar:
        model = stage_model(plan, catalog, reached.places, weights=True, progress=bar)
    with transfer_bar(f"copying to {target.uri}") as bar:
        sent = publish(model.path, reached.places.place(str(model.path)), target, name, bar)
    how = f"{words.size(sent.sent)} uploaded, verified" if sent.sent else "all of it was there, nothing was uploaded"
    print(target.uri)
    print(f"{words.size(sent.bytes)} in {sent.files} files, {words.duration(time.monotonic() - began)}: {how}")
    use = f"--model {name} --weights.mirror {root.uri}" if "/" in name else f"--model {target.uri}"
    print(f"use it with: {use}")


def say_hub(repository: str) -> None:
    """The hub's library shows no progress of ours."""
    print(f"fetching {repository} from the hub, unless its cache has it", file=sys.stderr)


def show_list(reached: Reached) -> None:
    """One line a model."""
    from llmft_core.report import words
    from llmft_core.weights.cache import cache_folder
    from llmft_core.weights.held import in_cache, in_mirror

    where = reached.own.what
    root = reached.places.place(where) if where else None
    held = in_mirror(root) if root else in_cache(reached.catalog, reached.places)
    if reached.own.json:
        rows = [{**vars(one), "place": one.place.uri} for one in held]
        print(json.dumps(rows, indent=2))
        return
    if not held and root:
        raise InputError(
            f"{root.uri} holds no models: give a mirror's root, or put one there with `{PROG} mirror MODEL {where}`"
        )
    if not held:
        print(f"{cache_folder()} holds no models yet: `{PROG} fetch MODEL`")
        return
    table = [
        [one.model, one.state, words.size(one.bytes), str(one.files), one.hashes, one.place.uri.removeprefix("file://")]
        for one in held
    ]
    print_table(["MODEL", "STATE", "SIZE", "FILES", "SHA-256 FROM", "WHERE"], table)


def verify(reached: Reached) -> None:
    """Read a model again, in a folder, at a URI or, by its name, in this node's cache. Raises LlmftError where a byte
    is wrong, once all has been read."""
    from llmft_core.weights.held import INCOMPLETE, cached_as
    from llmft_core.weights.stage import hub_repository

    what, catalog, places = reached.own.what, reached.catalog, reached.places
    if "://" in what or Path(what).expanduser().exists():
        found = [places.place(what)]
    else:
        held = cached_as(what, hub_repository(what, catalog), catalog, places)
        whole = [
            one for one in held if one.state != INCOMPLETE
        ]  # of a partial one each file is checked when it goes on
        found = [one.place for one in whole if one.hashes != "none"] or [one.place for one in whole]
        if not found:
            raise InputError(f"{what} is not whole in this node's cache: `{PROG} fetch {what}` goes on with it")
    damaged = [text for place in found if (text := damage(place))]
    if damaged:
        raise LlmftError("; ".join(damaged))


def damage(place: Place) -> str:
    """Reads one model and prints that all is well, or returns what is wrong."""
    from llmft_core.report import words
    from llmft_core.report.transfers import transfer_bar
    from llmft_core.weights import held
    from llmft_core.weights.cache import cache_folder

    with transfer_bar(f"reading {place.uri}") as bar:
        size, wrong = held.verify(place, bar)
    if not wrong:
        print(f"{place.uri}: {words.size(size)} read, all as written down")
        return ""
    if Path(place.path).is_relative_to(cache_folder()):
        way_out = "remove this folder and fetch the model again"
    else:
        way_out = "do not use it; remove these files and copy them again (`llmft weights mirror` sends what is missing)"
    return f"{place.uri} is damaged: {'; '.join(wrong)}: {way_out}"
