"""A plan's dataset, opened: its format with all that it reads before a row, and the sources of its splits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from llmft_core.catalog import Catalog
from llmft_core.data.files import FileSource, is_file, is_uri
from llmft_core.data.sources import SplitSource, find_sources
from llmft_core.errors import InputError, Problem, Problems, close_match
from llmft_core.extensions import DatasetFormat, Split
from llmft_core.options import kebab
from llmft_core.plan import RunPlan

if TYPE_CHECKING:
    from llmft_core.storage.places import Places


def open_dataset(
    catalog: Catalog, plan: RunPlan, places: Places | None
) -> tuple[DatasetFormat, dict[Split, SplitSource]]:
    """The format with its companions read, so that it knows its special tokens, and the sources of the splits.

    Raises InputError: no such rows, a companion that is missing or wrong; Problems for a role of `--data.train-on` that
    the format does not have.
    """
    dataset: DatasetFormat = catalog.create("dataset", plan.dataset)
    sources = find_sources(dataset, places, plan.data.mix)
    digests = {}
    for name in dataset.companions:
        shown, content = _companion(dataset, name, sources, places)
        try:
            dataset.read_companion(name, content)
        except InputError as error:
            raise InputError(f"{shown}: {error}") from error
        digests[name] = hashlib.sha256(content).hexdigest()
    dataset.companion_digests = digests
    _check_train_on(dataset, plan.data.train_on)
    return dataset, sources


def _companion(
    dataset: DatasetFormat, name: str, sources: dict[Split, SplitSource], places: Places | None
) -> tuple[str, bytes]:
    """What users call it, and its bytes."""
    option = dataset.companions[name]
    flag = f"--dataset.{kebab(option)}"
    given = str(getattr(dataset.options, option))
    if given:
        location = given if is_uri(given) else str(Path(given).expanduser())
        if not is_file(location, places):
            raise InputError(f"{flag}: there is no file {given}")
        file = FileSource(given, location, flag, places)
        with file.open() as stream:
            try:
                return given, stream.read()
            except OSError as error:
                raise file.unreadable(error) from error
    found = {split: source.companion(name) for split, source in sources.items()}
    train = found.pop("train")
    if train is None:
        raise InputError(
            f"there is no {name} beside {sources['train'].name}: put one there, or name it with {flag} FILE"
        )
    for split, content in found.items():
        if content not in (None, train):
            raise InputError(
                f"the {name} beside {sources[split].name} is another one than beside {sources['train'].name}: make "
                f"them the same, or name one with {flag} FILE"
            )
    return name, train


def _check_train_on(dataset: DatasetFormat, train_on: str) -> None:
    """Before any row is read, where the format knows its roles. Raises Problems."""
    if not dataset.roles or train_on == "all":
        return
    problems: list[Problem] = []
    names = [role.name for role in dataset.roles]
    if train_on == "completion" and not any(role.trained for role in dataset.roles):
        reason = (
            f"which of the roles {', '.join(names)} is to be learnt cannot be told from their names: name one or "
            "several (ROLE,…), or say all"
        )
        problems.append(Problem("data.train-on", reason))
    chosen = [] if train_on == "completion" else [part.strip() for part in train_on.split(",")]
    for name in chosen:
        if name and name not in names:
            meant = {known.casefold(): known for known in names}.get(name.casefold())
            close = f" (did you mean {meant}?)" if meant else close_match(name, names)
            problems.append(
                Problem("data.train-on", f"no row has the role {name}{close}; there are {', '.join(names)}")
            )
    if problems:
        raise Problems(problems)
