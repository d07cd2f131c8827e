"""Where a model lies in a mirror: the layouts that are recognised, and what there is in one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from llmft_core.errors import InputError
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import exists, list_names, read_bytes
from llmft_core.weights.manifest import UNFINISHED

HUB = "models--"  # the hub cache's folder of owner/name is models--owner--name
LONGEST_COMMIT = 100  # bytes of refs/main that are read


def folder_name(model: str) -> str:
    """The folder of a model in a mirror of ours: `owner--name`; a name without owner stays as it is."""
    return model.replace("/", "--")


def find_model(mirror: Place, repository: str, wanted: str, flag: str = "--model") -> Place:
    """The folder of a hub repository in a mirror; `wanted` is what the user wrote behind `flag`. The first of these
    that is there: `owner--name/`, `owner/name/`, `models--owner--name/` with refs/main and snapshots/, the mirror
    itself where its own name says that it is this model. Raises InputError where there is none."""
    owner, name = repository.split("/")
    for folder in (mirror / folder_name(repository), mirror / owner / name):
        if exists(folder / "config.json") or exists(folder / UNFINISHED):
            return folder
    cached = HUB + folder_name(repository)
    itself = mirror if mirror.name == cached else mirror / cached
    if (found := snapshot(itself)) is not None:
        return found
    is_model = exists(mirror / "config.json")
    if is_model and mirror.name in (name, folder_name(repository)):
        return mirror
    raise InputError(_missing(mirror, repository, wanted, is_model, flag))


def snapshot(folder: Place) -> Place | None:
    """The snapshot that refs/main of a model in the hub cache's layout names; None where there is no refs/main.
    Raises InputError where it names none that is there."""
    ref = folder / "refs" / "main"
    if not exists(ref):
        return None
    commit = read_bytes(ref, LONGEST_COMMIT).decode("ascii", "replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", commit):  # it becomes part of a path
        raise InputError(f"{ref.uri} holds {commit!r}, which is no commit: copy the model there again")
    found = folder / "snapshots" / commit
    if not exists(found / "config.json"):
        there = ", ".join(list_names(folder / "snapshots")[:5]) or "nothing"
        raise InputError(
            f"{ref.uri} names the commit {commit}, but {found.uri} has no config.json (snapshots/ holds {there}): "
            "copy the model there again"
        )
    return found


def _missing(mirror: Place, repository: str, wanted: str, is_model: bool, flag: str) -> str:
    """The error of a model that is not in a mirror."""
    plain = folder_name(repository)
    listed = [name for name in list_names(mirror) if name.endswith("/")] or list_names(mirror)
    there = ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "") if listed else "nothing"
    named = f"{wanted} ({repository})" if wanted != repository else wanted
    if is_model:
        way_out = f"it is a model's own folder: give {flag} {mirror.uri}, or the folder above it as mirror"
    else:
        elsewhere = "leave --weights.mirror out to take it from the hub" if flag == "--model" else f"give {flag} FOLDER"
        way_out = f"put it there with `llmft weights mirror {wanted} {mirror.uri}`, or {elsewhere}"
    what = flag.rpartition(".")[2].lstrip("-")  # model, tokenizer
    return (
        f"{what} {named} is not in the mirror {mirror.uri}: looked for {plain}/, {repository}/ and "
        f"{HUB}{plain}/refs/main, found {there}; {way_out}"
    )


@dataclass(frozen=True)
class Laid:
    """A model in a mirror, as a listing shows it."""

    model: str
    """Hub id where the layout tells one, else the folder's name."""
    folder: str
    """Relative to the mirror; empty where the mirror is the model."""


def models_in(mirror: Place, files: Iterable[str], commits: dict[str, str]) -> list[Laid]:
    """The models among the files of a mirror. `commits`: what refs/main of each models--owner--name names."""
    files = list(files)
    marks = ("config.json", UNFINISHED)
    folders = sorted({path.rpartition("/")[0] for path in files if path.rpartition("/")[2] in marks})
    if "" in folders:
        return [Laid(model_name(mirror.name), "")]
    found = []
    for folder in folders:
        parts = folder.split("/")
        if parts[0].startswith(HUB):
            if parts[1:] == ["snapshots", commits.get(parts[0], "")]:
                found.append(Laid(model_name(parts[0]), folder))
        elif len(parts) == 1:
            found.append(Laid(model_name(folder), folder))
        elif len(parts) == 2 and parts[0] not in folders:
            found.append(Laid(folder, folder))
    return found


def model_name(folder: str) -> str:
    """`owner/name` of a folder called `owner--name` or `models--owner--name`; another name as it is."""
    return folder.removeprefix(HUB).replace("--", "/", 1)
