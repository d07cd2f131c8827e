"""(kind, name) → class: unknown, ambiguous and failed are errors that name the way out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from llmft_core.errors import InputError, Problem, Problems, close_match
from llmft_core.extensions import DatasetFormat, Extension, Method, ModelFamily, StorageBackend, Strategy, Tracker
from llmft_core.hookspecs import KINDS
from llmft_core.loading import LoadedPlugins
from llmft_core.options import Options

KIND_BASES: dict[str, type[Extension]] = {
    "dataset": DatasetFormat,
    "storage": StorageBackend,
    "strategy": Strategy,
    "model": ModelFamily,
    "method": Method,
    "tracker": Tracker,
}
"""Kind → the base of its classes."""


@dataclass(frozen=True)
class CatalogEntry:
    """One class that a plugin offers. `state` is `conflict` where another plugin offers the same kind and name."""

    kind: str
    name: str
    extension: type[Extension]
    plugin_id: str
    state: Literal["loaded", "conflict"]


class Catalog:
    """All that the loaded plugins offer."""

    def __init__(self, plugins: LoadedPlugins) -> None:
        self.plugins = plugins
        self.faults: dict[str, str] = {}  # plugin id → what its hook did wrong
        found: list[tuple[str, type[Extension], str]] = []
        for kind, hook in KINDS.items():
            for implementation in getattr(plugins.manager.hook, hook).get_hookimpls():
                for extension in self._offered(kind, implementation.plugin_name, implementation.function):
                    found.append((kind, extension, implementation.plugin_name))
        owners: dict[tuple[str, str], set[str]] = {}
        for kind, extension, plugin_id in found:
            owners.setdefault((kind, extension.name), set()).add(plugin_id)
        self.entries = tuple(
            CatalogEntry(kind, ext.name, ext, plugin_id, "conflict" if len(owners[kind, ext.name]) > 1 else "loaded")
            for kind, ext, plugin_id in sorted(found, key=lambda item: (list(KINDS).index(item[0]), item[1].name))
        )

    def _offered(self, kind: str, plugin_id: str, hook: Any) -> list[type[Extension]]:
        try:
            offered = hook()
            for extension in offered:
                _check_class(extension, KIND_BASES[kind])
            names = [extension.name for extension in offered]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise TypeError(f"it offers {', '.join(twice)} more than once")
            return list(offered)
        except Exception as error:  # noqa: BLE001 - a stranger's hook may raise anything; it is named, not fatal
            self.faults[plugin_id] = f"{KINDS[kind]}: {type(error).__name__}: {' '.join(str(error).split())}"
            return []

    def names(self, kind: str) -> list[str]:
        """The names of a kind, sorted, each once."""
        return sorted({entry.name for entry in self.entries if entry.kind == kind})

    def entry(self, kind: str, name: str) -> CatalogEntry:
        """The one class of this kind and name. Raises InputError: unknown, failed or in conflict."""
        found = [entry for entry in self.entries if entry.kind == kind and entry.name == name]
        if len(found) > 1:
            ids = sorted({entry.plugin_id for entry in found})
            raise InputError(
                f"{kind} {name} is offered by {' and '.join(ids)}: disable one with --disable-plugin {ids[-1]}"
            )
        if found:
            return found[0]
        raise InputError(f"no {kind} is called {name}{self.way_out(kind, name, self.names(kind))}")

    def way_out(self, kind: str, name: str, known: list[str]) -> str:
        """What follows `no … is called NAME`: a close match, what there is, and plugins that failed or are disabled."""
        parts = [close_match(name, known), f"; there are {', '.join(known)}" if known else ""]
        for record in self.plugins.records:
            if record.state == "failed":
                parts.append(f"; plugin {record.id} could not be loaded ({record.cause})")
            elif record.state == "disabled":
                parts.append(f"; plugin {record.id} is disabled")
        parts += [f"; plugin {plugin_id} is broken ({cause})" for plugin_id, cause in self.faults.items()]
        return "".join(parts) + f"; `llmft plugins` lists all, and a {kind} comes with `pip install llmft-plugin-…`"

    def create(self, kind: str, choice: Mapping[str, Any]) -> Any:
        """An extension from its place in the plan: `{"name": "s3", "bucket": "b"}`. Raises InputError, all problems
        of the options together."""
        name = str(choice["name"])
        extension = self.entry(kind, name).extension
        given = {key: value for key, value in choice.items() if key != "name"}
        return extension(validated(extension.options_type, given, kind))

    def backend_for(self, scheme: str) -> type[StorageBackend]:
        """The storage backend for a URI scheme. Raises InputError: none, or several."""
        backends = [
            (e.extension, e.plugin_id)
            for e in self.entries
            if e.kind == "storage" and issubclass(e.extension, StorageBackend)
        ]
        found = [(backend, plugin_id) for backend, plugin_id in backends if backend.scheme == scheme]
        if not found:
            known = sorted({backend.scheme for backend, _ in backends})
            raise InputError(f"no storage backend reads {scheme}://{self.way_out('storage', scheme, known)}")
        if len(found) > 1:
            ids = sorted(f"{backend.name} ({plugin_id})" for backend, plugin_id in found)
            last = sorted(plugin_id for _, plugin_id in found)[-1]
            raise InputError(f"{scheme}:// is read by {' and '.join(ids)}: disable one with --disable-plugin {last}")
        return found[0][0]

    def families(self) -> list[ModelFamily]:
        """All model families, those that answer only as a last resort at the end."""
        families = [e.extension(e.extension.options_type()) for e in self.entries if e.kind == "model"]
        return sorted(
            (family for family in families if isinstance(family, ModelFamily)), key=lambda family: family.fallback
        )


def _check_class(extension: Any, base: type[Extension]) -> None:
    """Raises TypeError for what cannot be used, before anyone chooses it."""
    if not (isinstance(extension, type) and issubclass(extension, base)):
        raise TypeError(f"{extension!r} is not a class derived from {base.__name__}")
    needed = ("name", "summary", "scheme") if issubclass(extension, StorageBackend) else ("name", "summary")
    lacking = [field for field in needed if not isinstance(getattr(extension, field, None), str)]
    lacking += [f"{method}()" for method in sorted(getattr(extension, "__abstractmethods__", ()))]
    if lacking:
        raise TypeError(f"{extension.__qualname__} does not define {', '.join(lacking)}")
    if issubclass(extension, ModelFamily):
        extension.options_type()  # nothing can be said to a family, so it must do without


def validated(options_type: type[Options], given: Mapping[str, Any], path: str) -> Options:
    """Options from plain data. Raises Problems, each with its path under `path`."""
    try:
        return options_type.model_validate(dict(given))
    except ValidationError as error:
        raise Problems(validation_problems(error, options_type, path)) from None


def validation_problems(error: ValidationError, model: type[BaseModel], path: str = "") -> list[Problem]:
    """pydantic's errors in the words of the plan: path, value, what is allowed, a close match for a typo."""
    problems = []
    for detail in error.errors(include_url=False):
        location = [str(part) for part in detail["loc"]]
        full = ".".join([path, *location] if path else location)
        value = detail["input"]
        if detail["type"] == "extra_forbidden":
            owner: Any = model
            for part in location[:-1]:
                owner = next((f.annotation for n, f in owner.model_fields.items() if f.alias == part), owner)
            known = [field.alias or name for name, field in getattr(owner, "model_fields", {}).items()]
            listing = f"; there are {', '.join(sorted(known))}" if known else "; it has no options"
            reason = f"no such option{close_match(location[-1], known)}{listing}"
        elif detail["type"] == "missing":
            reason = "is required"
        else:
            message = detail["msg"].removeprefix("Value error, ")
            reason = f"{value!r}: {message[:1].lower()}{message[1:]}"
            if detail["type"] == "literal_error":
                reason += close_match(str(value), re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
        problems.append(Problem(full, reason))
    return problems
