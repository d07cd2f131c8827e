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
from llmft_core.plan import RunPlan, family_of_name
from llmft_core.weights import hub
from llmft_core.weights.cache import cache_folder
from llmft_core.weights.files import check_complete, check_weights, identity, is_model_file, is_small_file, read_config
from llmft_core.weights.mirror import locked, mirror

if TYPE_CHECKING:
    from llmft_core.storage.places import Places


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


def stage_model(plan: RunPlan, catalog: Catalog, places: Places, *, weights: bool) -> ModelFolder:
    """Fetch or make what `plan.model.name` names: a short name, a hub id, a folder or a URI.

    Without `weights` only config and tokenizer are fetched; that there are weights is checked all the same. Safe to
    call from several processes of a node at once. Raises InputError naming what is missing and what to do.
    """
    name = plan.model.name
    family = family_of_name(name, catalog)
    if family is not None:
        repository = family.hub_id(name)
        path, digest = _built(family, name) if repository is None else _from_hub(repository, weights)
    elif "://" in name:
        path, digest = _from_uri(name, places, weights)
    elif (folder := Path(name).expanduser()).is_dir():
        path, digest = folder.absolute(), ""
    elif hub.is_hub_id(name):
        path, digest = _from_hub(name, weights)
    else:
        raise InputError(f"model {name}: no such folder; give an existing folder, a hub id (owner/name) or a URI")
    config = read_config(path, name)
    if weights or not digest:
        check_complete(path, name)
    return ModelFolder(path, family or family_for(config, name, catalog), config, digest or identity(path))


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


def _built(family: ModelFamily, name: str) -> tuple[Path, str]:
    """A model that its family makes: once for each version of its content."""
    folder = cache_folder() / "built" / f"{family.name}-{name}-{family.content_version}"
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


def _from_uri(uri: str, places: Places, weights: bool) -> tuple[Path, str]:
    from llmft_core.storage.transfer import list_files

    place = places.place(uri)
    listed = list_files(place)
    if listed:
        check_weights(listed, uri)
    path = mirror(place, f"model {uri}", is_model_file if weights else is_small_file)
    wanted = {name: size for name, size in sorted(listed.items()) if is_model_file(name)}
    small = [(name, hashlib.sha256((path / name).read_bytes()).hexdigest()) for name in wanted if is_small_file(name)]
    return path, hashlib.sha256(f"{uri}\0{wanted}\0{small}".encode()).hexdigest()
