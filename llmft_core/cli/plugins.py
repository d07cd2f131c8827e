"""`llmft plugins`: what there is to choose from, what could not be loaded and why."""

from __future__ import annotations

import argparse

from llmft_core.catalog import Catalog, CatalogEntry
from llmft_core.cli.describe import default_text, print_table, type_name
from llmft_core.errors import InputError
from llmft_core.extensions import ModelFamily, StorageBackend
from llmft_core.loading import load_plugins
from llmft_core.options import leaves

_FLAG_KINDS = ("dataset", "storage", "strategy", "method")  # kinds whose options are flags: `--storage.bucket`


def add_parser(subparsers: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:  # type: ignore[type-arg]
    """Add `plugins` to the commands."""
    parser = subparsers.add_parser(
        "plugins",
        parents=[common],
        help="list plugins, or describe one and its options",
        description="List every plugin with its state, or describe all plugins of one name and their options.",
    )
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="a plugin's name, or a model's short name")
    parser.set_defaults(command=run_command)


def run_command(args: argparse.Namespace) -> int:
    """List or describe. Raises InputError for a name that nothing has."""
    catalog = Catalog(load_plugins(args.disable_plugin or ()))
    if args.name:
        _describe(args.name, catalog)
    else:
        print_table(("KIND", "NAME", "DISTRIBUTION", "VERSION", "STATE"), list_rows(catalog))
    return 0


def list_rows(catalog: Catalog) -> list[tuple[str, str, str, str, str]]:
    """Kind, name, distribution, version and state of all that is offered; then the plugins that offer nothing."""
    rows = [
        (entry.kind, entry.name, record.distribution, record.version, _state(entry, catalog))
        for entry in catalog.entries
        for record in [catalog.plugins.record(entry.plugin_id)]
    ]
    offering = {entry.plugin_id for entry in catalog.entries}
    for record in catalog.plugins.records:
        if record.state == "failed":
            state = f"failed: {record.cause}"
        elif record.state == "disabled":
            state = "disabled"
        elif record.id in catalog.faults:
            state = f"failed: {catalog.faults[record.id]}"
        elif record.id not in offering:
            state = "loaded, but offers nothing: its hooks return no classes, or lack @hookimpl"
        else:
            continue
        rows.append(("-", record.entry, record.distribution, record.version, state))
    return rows


def _state(entry: CatalogEntry, catalog: Catalog) -> str:
    if entry.state == "loaded":
        return "loaded"
    others = sorted(
        other.plugin_id
        for other in catalog.entries
        if (other.kind, other.name) == (entry.kind, entry.name) and other is not entry
    )
    return f"in conflict with {', '.join(others)}: disable one with --disable-plugin {entry.plugin_id}"


def _describe(name: str, catalog: Catalog) -> None:
    families = {family.name: family for family in catalog.families()}
    entries = [
        entry
        for entry in catalog.entries
        if entry.name == name or (entry.kind == "model" and name in families[entry.name].names)
    ]
    broken = [row for row in list_rows(catalog) if row[0] == "-" and row[1] == name]
    if not entries and not broken:
        known = {entry.name for entry in catalog.entries} | {n for family in families.values() for n in family.names}
        raise InputError(f"no plugin is called {name}{catalog.way_out('plugin', name, sorted(known))}")
    for position, entry in enumerate(entries):
        print("\n" * bool(position), end="")
        _describe_entry(entry, families.get(entry.name) if entry.kind == "model" else None, catalog)
    for _, entry_name, distribution, version, state in broken:
        print(f"plugin {entry_name} ({distribution} {version}): {state}")


def _describe_entry(entry: CatalogEntry, family: ModelFamily | None, catalog: Catalog) -> None:
    record = catalog.plugins.record(entry.plugin_id)
    print(f"{entry.kind} {entry.name}: {entry.extension.summary}")
    print(f"  from {record.distribution} {record.version} (plugin {record.id}, {_state(entry, catalog)})")
    print(f"  {_how_to_choose(entry, family)}")
    if issubclass(entry.extension, StorageBackend):
        print(f"  answers to {entry.extension.scheme}:// addresses")
    prefix = f"--{entry.kind}" if entry.kind in _FLAG_KINDS else ""
    rows = []
    for path, field in leaves(entry.extension.options_type):
        option = f"{prefix}.{path}" if prefix else path
        rows.append((f"  {option}", type_name(field.annotation), default_text(field), field.description or ""))
    if rows:
        print_table(("  OPTION", "TYPE", "DEFAULT", "MEANING"), rows)
    else:
        print("  no options")


def _how_to_choose(entry: CatalogEntry, family: ModelFamily | None) -> str:
    if family is not None:
        return f"choose with --model {', '.join(family.names)}" if family.names else "chosen by a model's config.json"
    options = ", …" if entry.kind == "tracker" and entry.extension.options_type.model_fields else ""
    in_yaml = f"; its options in YAML: `tracker: [{{name: {entry.name}{options}}}]`" if options else ""
    return f"choose with --{entry.kind} {entry.name}{in_yaml}"
