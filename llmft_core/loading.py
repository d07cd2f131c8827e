"""Entry points → plugins. A plugin that fails is a record, not a crash.

Our own walk, because pluggy's `load_setuptools_entrypoints` silently drops a second distribution with the same entry
name and lets one broken import end the program.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

import pluggy

from llmft_core import hookspecs
from llmft_core.extensions import API_VERSION

ENTRY_POINT_GROUP = "llmft"

State = Literal["loaded", "failed", "disabled"]


@dataclass(frozen=True)
class PluginRecord:
    """One entry point and what became of it. `cause` says why it failed, in one line."""

    distribution: str
    version: str
    entry: str
    state: State
    cause: str = ""

    @property
    def id(self) -> str:
        """Unique on a machine: `distribution:entry`."""
        return f"{self.distribution}:{self.entry}"


@dataclass(frozen=True)
class LoadedPlugins:
    """The plugin manager of this process and a record of every entry point."""

    manager: pluggy.PluginManager
    records: tuple[PluginRecord, ...]

    def record(self, plugin_id: str) -> PluginRecord:
        """The record of `distribution:entry`."""
        return next(record for record in self.records if record.id == plugin_id)


def load_plugins(disabled: Sequence[str] = (), entries: Iterable[EntryPoint] | None = None) -> LoadedPlugins:
    """Load all plugins of this environment.

    `disabled` holds `distribution:entry`, an entry's name or a distribution's name; what LLMFT_DISABLED_PLUGINS of
    this process names is disabled too. Never raises for a plugin's fault.
    """
    manager = pluggy.PluginManager("llmft")
    manager.add_hookspecs(hookspecs)
    found = entry_points(group=ENTRY_POINT_GROUP) if entries is None else entries
    # Discovery finds an editable install and its source folder as two distributions of one name: keep the first.
    unique = {(_distribution(entry), entry.name): entry for entry in reversed(list(found))}
    unwanted = {*disabled, *disabled_by_environment()}
    records = [_load(manager, entry, distribution, unwanted) for (distribution, _), entry in sorted(unique.items())]
    return LoadedPlugins(manager, tuple(records))


def disabled_by_environment() -> list[str]:
    """The plugins that LLMFT_DISABLED_PLUGINS names, separated by commas; a node of a cluster may have its own."""
    return [name.strip() for name in os.environ.get("LLMFT_DISABLED_PLUGINS", "").split(",") if name.strip()]


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "(unknown)"


def _load(manager: pluggy.PluginManager, entry: EntryPoint, distribution: str, disabled: set[str]) -> PluginRecord:
    version = entry.dist.version if entry.dist else ""
    plugin_id = f"{distribution}:{entry.name}"

    def record(state: State, cause: str = "") -> PluginRecord:
        return PluginRecord(distribution, version, entry.name, state, cause)

    if disabled & {plugin_id, entry.name, distribution}:
        return record("disabled")
    try:
        module = entry.load()
        wanted = getattr(module, "llmft_api", None)
        if wanted != API_VERSION:
            written = "does not say which" if wanted is None else f"was written for {wanted}"
            return record(
                "failed",
                f"{entry.value} {written}; this llmft has extension API {API_VERSION}: "
                f"set `llmft_api = {API_VERSION}` in it once it follows the contracts, or install a matching version",
            )
        manager.register(module, name=plugin_id)
        manager.check_pending()  # a misspelt hook passes register() without a word
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a stranger's module raises becomes its record
        if manager.has_plugin(plugin_id):
            manager.unregister(name=plugin_id)
        return record("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return record("loaded")
