"""The model of a plan → a folder on this node, and the family that knows it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError
from llmft_core.extensions import ModelFamily
from llmft_core.plan import RunPlan
from llmft_core.plan_layers import family_of_name
from llmft_core.weights import hub
from llmft_core.weights.cache import cache_folder, locked
from llmft_core.weights.files import check_complete, check_weights, identity, is_model_file, is_small_file, read_config
from llmft_core.weights.layout import find_model, snapshot
from llmft_core.weights.mirror import look, mirror

if TYPE_CHECKING:
    from llmft_core.storage.engine import Progress
    from llmft_core.storage.places import Place, Places
    from llmft_core.weights.share import Sharer


@dataclass(frozen=True)
class ModelFolder:
    """A model on this node."""

    path: Path
    """Folder with config.json, tokenizer files and, where they were staged, weights."""
    family: ModelFamily
    config: dict[str, Any]
    """config.json."""
    digest: str
    """Identifies the whole model (hex), whether its weights were staged or not."""


def stage_model(
    plan: RunPlan,
    catalog: Catalog,
    places: Places,
    *,
    weights: bool,
    progress: Progress | None = None,
    sharer: Sharer | None = None,
) -> ModelFolder:
    """Fetch or make what `plan.model.name` names: a short name, a hub id, a folder or a URI. What would come from the
    hub comes from `plan.weights.mirror` where that is set.

    Without `weights` only config and tokenizer are fetched; that there are weights is checked all the same. Safe to
    call from several processes of a node at once. `sharer`: this node's end of an exchange with others. Raises
    InputError naming what is missing and what to do.
    """
    name = plan.model.name
    family = family_of_name(name, catalog)
    repository = hub_repository(name, catalog)
    if repository and plan.weights.mirror:
        place = find_model(mirror_place(plan.weights.mirror, places), repository, name)
        path, digest = _from_place(place, f"model {name}", repository, weights, progress, sharer)
    elif repository:
        path, digest = _from_hub(repository, weights)
    elif family is not None:
        path, digest = _built(family, name)
    elif "://" in name:
        place = places.place(name)
        path, digest = _from_place(place, f"model {name}", "", weights, progress, sharer)
    elif (folder := Path(name).expanduser()).is_dir():
        path, digest = folder.absolute(), ""
    else:
        raise InputError(f"model {name}: no such folder; give an existing folder, a hub id (owner/name) or a URI")
    config = read_config(path, name)
    if weights or not digest:
        check_complete(path, name)
    return ModelFolder(path, family or family_for(config, name, catalog), config, digest or identity(path))


def comes_from_place(plan: RunPlan, catalog: Catalog) -> bool:
    """Whether the model lies in a mirror or at a URI."""
    name = plan.model.name
    if hub_repository(name, catalog):
        return bool(plan.weights.mirror)
    return family_of_name(name, catalog) is None and "://" in name


def hub_repository(name: str, catalog: Catalog) -> str:
    """The hub repository that a short name or a hub id means; empty for a folder, a URI and what a family builds."""
    family = family_of_name(name, catalog)
    if family is not None:
        return family.hub_id(name) or ""
    return name if hub.is_hub_id(name) and not Path(name).expanduser().is_dir() else ""


def family_for(config: Mapping[str, Any], origin: str, catalog: Catalog) -> ModelFamily:
    """The family that claims a config.json; the fallback's if no other does. InputError for none or several."""
    claiming = [family for family in catalog.families() if family.claims(config)]
    special = [family for family in claiming if not family.fallback]
    if len(special) > 1:
        listing = " and ".join(family.name for family in special)
        raise InputError(f"model {origin}: claimed by the families {listing}; disable one with --disable-plugin")
    if not claiming:
        raise InputError(
            f"model {origin}: no family claims model_type {config.get('model_type')}; `llmft plugins` lists families"
        )
    return (special or claiming)[0]


def built_folder(family: ModelFamily, name: str) -> Path:
    """Where this node keeps a model that its family makes. It need not exist yet."""
    return cache_folder() / "built" / f"{family.name}-{name}-{family.content_version}"


def _built(family: ModelFamily, name: str) -> tuple[Path, str]:
    """A model that its family makes: once for each version of its content."""
    folder = built_folder(family, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: it holds no lock any more
            partial.mkdir()
            family.build(name, partial)
            os.replace(partial, folder)
    return folder, identity(folder)


def _from_hub(repository: str, weights: bool) -> tuple[Path, str]:
    path = hub.fetch_model(repository, weights=weights)
    return path, hashlib.sha256(f"{repository}@{path.name}".encode()).hexdigest()  # the folder's name is the commit


def mirror_place(uri: str, places: Places) -> Place:
    """Where `weights.mirror` points. Raises InputError naming that option."""
    try:
        return places.place(uri)
    except InputError as error:
        raise InputError(f"weights.mirror: {error}") from error


def _from_place(
    place: Place, origin: str, repository: str, weights: bool, progress: Progress | None, sharer: Sharer | None
) -> tuple[Path, str]:
    source = look(place, origin)
    if "config.json" not in source.sizes and "refs/main" in source.sizes and (found := snapshot(place)) is not None:
        place, source = found, look(found, origin)  # a URI of a models--owner--name folder
    if source.sizes:
        check_weights(source.sizes, origin.removeprefix("model "))
    wanted = is_model_file if weights else is_small_file
    path = mirror(place, origin, wanted, source=source, model=repository, progress=progress, sharer=sharer)
    if digest := source.digest():
        return path, digest
    facts = {name: (size, source.versions[name]) for name, size in source.sizes.items() if is_model_file(name)}
    small = [(name, hashlib.sha256((path / name).read_bytes()).hexdigest()) for name in facts if is_small_file(name)]
    return path, hashlib.sha256(f"{place.uri}\0{facts}\0{small}".encode()).hexdigest()
