"""Layers → one plan: files, environment and flags are merged, plugins looked up, all that is wrong is said together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from llmft_core.catalog import Catalog, validated, validation_problems
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.extensions import ModelFamily, StorageBackend
from llmft_core.options import Options
from llmft_core.plan import SINGLE_KINDS, Choice, RunPlan, as_choice, as_choices


@dataclass(frozen=True)
class Layer:
    """Part of a plan and where it comes from: `llmft.yaml`, `--plan run.yaml`, the environment, flags."""

    source: str
    data: Mapping[str, Any]


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge layers, the later the stronger; also says which layer each dotted path came from.

    Choosing another plugin of a kind drops the options that a weaker layer gave to the one that it named. Options of
    which no layer says whose they are belong to the plugin that is chosen in the end, the default one or another.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.data.items():
            if key in (*SINGLE_KINDS, "model"):
                value = as_choice(value)
                named = merged[key].get("name") if isinstance(merged.get(key), dict) else None
                if key != "model" and named and isinstance(value, Mapping) and value.get("name", named) != named:
                    merged[key] = {}
            if key == "tracker":
                value = as_choices(value)
            _merge_into(merged, key, value, key, layer.source, sources)
    for key in SINGLE_KINDS:
        if isinstance(merged.get(key), dict) and "name" not in merged[key]:
            merged[key] = {**(RunPlan.model_fields[key].default or {}), **merged[key]}
    return merged, sources


def _merge_into(target: dict[str, Any], key: str, value: Any, path: str, source: str, sources: dict[str, str]) -> None:
    if isinstance(value, Mapping):
        inner = target.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = target[key] = {}
        for name, item in value.items():
            _merge_into(inner, str(name), item, f"{path}.{name}", source, sources)
    else:
        target[key] = value
    sources[path] = source


def resolve(layers: Sequence[Layer], catalog: Catalog) -> RunPlan:
    """Layers → a plan whose plugins exist and whose options are valid. Raises Problems: all of them together."""
    merged, sources = merge(layers)
    problems: list[Problem] = []
    try:
        plan = RunPlan.model_validate(merged)
    except ValidationError as error:
        problems += validation_problems(error, RunPlan)
        # The parts that are wrong are left out, so that the plugins' options are checked in the same pass.
        wrong = {str(detail["loc"][0]) for detail in error.errors()}
        plan = RunPlan.model_validate({k: v for k, v in merged.items() if k not in wrong})
    updates: dict[str, Any] = {}
    for kind in SINGLE_KINDS:
        choice = getattr(plan, kind)
        if choice is not None:
            updates[kind] = _checked(kind, choice, catalog, problems)
    updates["tracker"] = [_checked("tracker", choice, catalog, problems) for choice in plan.tracker]
    updates["backends"] = {
        name: _without_name(_checked("storage", {**options, "name": name}, catalog, problems, f"backends.{name}"))
        for name, options in plan.backends.items()
    }
    if plan.storage["name"] in plan.backends:
        name = plan.storage["name"]
        problems.append(Problem(f"backends.{name}", f"{name} is the run's own storage: write --storage.… instead"))
    problems += _model_problems(plan, catalog)
    if updates["storage"] and not any(problem.path.startswith("storage") for problem in problems):
        backend: StorageBackend = catalog.create("storage", updates["storage"])
        try:
            backend.root()
        except Problems as error:
            problems += error.problems
        except InputError as error:
            problems.append(Problem("storage", str(error)))
    if problems:
        raise Problems([_with_source(problem, sources) for problem in problems])
    return plan.model_copy(update=updates)


def resolve_storage(layers: Sequence[Layer], catalog: Catalog) -> Choice:
    """What the layers say of the run's storage, with defaults filled in. The rest of the plan may be wrong or missing.
    Raises Problems."""
    only = [Layer(layer.source, {k: v for k, v in layer.data.items() if k == "storage"}) for layer in layers]
    return resolve(only, catalog).storage


def resolve_backends(layers: Sequence[Layer], catalog: Catalog) -> dict[str, dict[str, Any]]:
    """What the layers say of storage, as options by backend name: the run's storage is one of them here, and its
    `backends` options are stronger. The rest of the plan may be wrong or missing. Raises Problems."""
    only = [Layer(layer.source, {k: v for k, v in layer.data.items() if k in _STORAGE_KEYS}) for layer in layers]
    merged, sources = merge(only)
    wanted: dict[str, dict[str, Any]] = {}
    storage = as_choice(merged.get("storage", {}))
    if isinstance(storage, Mapping) and isinstance(storage.get("name"), str):
        wanted[storage["name"]] = _without_name(dict(storage))
    for name, options in (merged.get("backends") or {}).items():
        wanted[name] = {**wanted.get(name, {}), **options}
    problems: list[Problem] = []
    checked = {
        name: _without_name(_checked("storage", {**options, "name": name}, catalog, problems, f"backends.{name}"))
        for name, options in wanted.items()
    }
    if problems:
        raise Problems([_with_source(problem, sources) for problem in problems])
    return checked


_STORAGE_KEYS = ("storage", "backends")


def _without_name(choice: Choice) -> Choice:
    return {key: value for key, value in choice.items() if key != "name"}


def _checked(kind: str, choice: Choice, catalog: Catalog, problems: list[Problem], path: str = "") -> Choice:
    """The choice with its options validated and defaults filled in; problems are appended, not raised."""
    try:
        extension = catalog.entry(kind, choice["name"]).extension
        options = validated(extension.options_type, _without_name(choice), path or kind)
    except Problems as error:
        problems += error.problems
        return choice
    except InputError as error:
        problems.append(Problem(path or kind, str(error)))
        return choice
    return {"name": choice["name"], **options.model_dump(mode="json", by_alias=True)}


def _model_problems(plan: RunPlan, catalog: Catalog) -> list[Problem]:
    name = plan.model.name
    if family_of_name(name, catalog) or re.search(r"[/\\]|^\.", name) or "://" in name:
        return []
    names = [known for family in catalog.families() for known in family.names]
    return [
        Problem(
            "model",
            f"no model is called {name}{catalog.way_out('model', name, names)}; "
            "a hub id has the form owner/name, a folder starts with ./ or /",
        )
    ]


def family_of_name(name: str, catalog: Catalog) -> ModelFamily | None:
    """The family that offers a model's short name. Raises InputError when several do."""
    families = [family for family in catalog.families() if name in family.names]
    if len(families) > 1:
        raise InputError(f"model {name} is offered by the families {', '.join(f.name for f in families)}")
    return families[0] if families else None


def _with_source(problem: Problem, sources: Mapping[str, str]) -> Problem:
    """Adds which file or variable said so, where it was not a flag."""
    source = sources.get(problem.path, "flags")
    return problem if source == "flags" else Problem(problem.path, f"{problem.reason} (from {source})")


def chosen_options(catalog: Catalog, merged: Mapping[str, Any]) -> dict[str, type[Options]]:
    """Dotted prefix → options type of every plugin that a merged plan chooses and the catalogue knows."""
    chosen: dict[str, type[Options]] = {}
    for kind in SINGLE_KINDS:
        choice = as_choice(merged.get(kind, RunPlan.model_fields[kind].default))
        choice = choice if isinstance(choice, Mapping) else {}  # anything else is reported by RunPlan
        name = choice.get("name", (RunPlan.model_fields[kind].default or {}).get("name")) if choice else None
        if name and any(entry.kind == kind and entry.name == name for entry in catalog.entries):
            chosen[kind] = next(e.extension for e in catalog.entries if (e.kind, e.name) == (kind, name)).options_type
    for entry in catalog.entries:
        if entry.kind == "storage":
            chosen[f"backends.{entry.name}"] = entry.extension.options_type
    return chosen
