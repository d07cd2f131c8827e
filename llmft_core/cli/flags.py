"""Flags of `llmft run` and `llmft plan`: argv, files and environment → a plan.

argparse parses and writes the help, pydantic converts and checks. Our own part is the pre-pass: which plugins are
chosen decides which flags exist. See docs/decisions/0003-command-line.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmft_core.catalog import Catalog
from llmft_core.cli.describe import default_text, type_name
from llmft_core.cli.plan_file import read_plan_at
from llmft_core.errors import InputError, Problem, Problems, close_match
from llmft_core.hookspecs import KINDS
from llmft_core.loading import load_plugins
from llmft_core.options import leaves
from llmft_core.plan import SINGLE_KINDS, RunPlan
from llmft_core.plan_layers import Layer, chosen_options, merge, resolve, resolve_backends
from llmft_core.plan_sources import (
    PROJECT_FILE,
    environment_layer,
    known_fields,
    read_plan_file,
    set_path,
)

SELECTORS = (*SINGLE_KINDS, "model")


def _wide(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34, width=118)


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of leaving, and never guesses from a prefix."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=_wide, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}: `{self.prog} --help` lists all flags")


@dataclass(frozen=True)
class Given:
    """What the user gave: the plan's layers and what belongs to the program itself."""

    layers: tuple[Layer, ...]
    catalog: Catalog
    problems: tuple[Problem, ...]
    parser: Parser
    debug: bool
    help: bool

    def plan(self) -> RunPlan:
        """The resolved plan. Raises Problems: unknown flags and variables with everything else that is wrong."""
        problems = list(self.problems)
        plan: RunPlan | None = None
        try:
            plan = resolve(self.layers, self.catalog)
        except Problems as error:
            problems += error.problems
        if plan is None or problems:
            raise Problems(problems)
        return plan


def read_flags(
    argv: Sequence[str], environ: Mapping[str, str], folder: Path, prog: str, saved: Layer | None = None
) -> Given:
    """Read argv, `llmft.yaml` in `folder`, `--plan` and the environment; or argv over a `saved` plan, and nothing else.
    Raises InputError where no plan can be made of them at all; other problems are collected."""
    first = Parser(prog=prog)
    add_program_flags(first)
    for kind in SELECTORS:
        first.add_argument(f"--{kind}", f"--{kind}.name", dest=f"{kind}.name", default=argparse.SUPPRESS)
    early, _ = first.parse_known_args(list(argv))

    files = [read_plan_file(folder / PROJECT_FILE, PROJECT_FILE)] if (folder / PROJECT_FILE).is_file() else []
    if saved is not None:
        files, environ = [saved], {}
    elif early.plan is not None and "://" in early.plan:
        files.append(fetch_plan(early.plan, argv, environ, files, early))
    elif early.plan is not None:
        files.append(read_plan_file(Path(early.plan)))
    disabled = disabled_by(early, files)
    catalog = Catalog(load_plugins(disabled))
    unknown_plugins = [
        Problem("disable-plugin", f"no plugin is called {name}{close_match(name, known)}; `llmft plugins` lists all")
        for name in disabled
        if name not in (known := _plugin_words(catalog))
    ]

    choices = chosen(early, environ, files)
    fields = dict(known_fields(catalog, choices))
    from_environment, problems = environment_layer(environ, fields, plugins_options(catalog, choices))

    parser = full_parser(prog, catalog, choices)
    parsed, extra = parser.parse_known_args(list(argv))
    from_flags: dict[str, Any] = {}
    for path, value in vars(parsed).items():
        if path in fields:
            set_path(from_flags, path, value)
    if disabled:
        from_flags["disable-plugin"] = list(dict.fromkeys(disabled))
    problems += unknown_plugins + unknown_flags(extra, list(fields), catalog, choices)
    layers = (*files, from_environment, Layer("flags", from_flags))
    return Given(layers, catalog, tuple(problems), parser, early.debug, early.help)


def read_beside(
    add_own_flags: Callable[[argparse.ArgumentParser], None],
    argv: Sequence[str],
    environ: Mapping[str, str],
    folder: Path,
    prog: str,
) -> tuple[argparse.Namespace, Given] | None:
    """A command's own flags, and those of `llmft run` beside them; None after `--help`."""
    early = Parser(prog=prog)
    add_own_flags(early)
    own, rest = early.parse_known_args(list(argv))
    given = read_flags(rest, environ, folder, prog)
    if given.help:
        add_own_flags(given.parser)
        given.parser.print_help()
        return None
    return own, given


def chosen(early: argparse.Namespace, environ: Mapping[str, str], files: Sequence[Layer]) -> dict[str, Any]:
    """The files and the choice of plugins, merged: which plugins are chosen decides which flags there are."""
    selected: dict[str, Any] = {}
    for kind in SELECTORS:
        if hasattr(early, f"{kind}.name"):
            set_path(selected, f"{kind}.name", getattr(early, f"{kind}.name"))
    # The environment is read twice: it may choose the plugins whose options it sets.
    chosen_by_environment, _ = environment_layer(environ, [f"{kind}.name" for kind in SELECTORS])
    choices, _ = merge([*files, chosen_by_environment, Layer("flags", selected)])
    return choices


def disabled_by(early: argparse.Namespace, files: Sequence[Layer]) -> list[str]:
    """Plugins that flags and files disable."""
    disabled = list(early.disable_plugin or [])
    for layer in files:
        disabled += _names(layer.data.get("disable-plugin", []))
    return disabled


def fetch_plan(
    uri: str, argv: Sequence[str], environ: Mapping[str, str], files: Sequence[Layer], early: argparse.Namespace
) -> Layer:
    """The plan at a URI. How it is reached is said by `--backends.NAME.OPTION` or `--storage.OPTION`, `llmft.yaml` and
    the environment; the plan itself cannot say it. Raises InputError, whatever goes wrong."""
    catalog = Catalog(load_plugins(disabled_by(early, files)))
    choices = chosen(early, environ, files)
    fields = dict(known_fields(catalog, choices))
    from_environment, _ = environment_layer(environ, fields)  # what is wrong here is said once the plan is there
    parsed, _ = full_parser("llmft", catalog, choices).parse_known_args(list(argv))
    flags: dict[str, Any] = {}
    for path, value in vars(parsed).items():
        if path in fields:
            set_path(flags, path, value)
    backends = resolve_backends([*files, from_environment, Layer("flags", flags)], catalog)
    return read_plan_at(uri, catalog, backends)


def plugins_options(catalog: Catalog, choices: Mapping[str, Any]) -> dict[str, str]:
    """Path → why it sets nothing here, for the options of plugins that the plan does not choose."""
    owners: dict[str, list[str]] = {}
    for entry in catalog.entries:
        if entry.kind in SINGLE_KINDS:
            for path, _ in leaves(entry.extension.options_type, entry.kind):
                owners.setdefault(path, []).append(entry.name)
    reasons = {}
    for path, names in owners.items():
        kind = path.split(".")[0]
        chosen = chosen_name(kind, choices) or "another"
        reasons[path] = f"is an option of {kind} {' and '.join(names)}, but the plan chooses {chosen}"
    return reasons


def _plugin_words(catalog: Catalog) -> set[str]:
    """All that `--disable-plugin` understands."""
    return {word for record in catalog.plugins.records for word in (record.id, record.entry, record.distribution)}


def add_program_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that are not part of the plan."""
    group = parser.add_argument_group("program")
    group.add_argument("-h", "--help", action="store_true", help="show this help and leave")
    group.add_argument("--debug", action="store_true", help="show tracebacks and the logs of Ray and all libraries")
    group.add_argument("--plan", metavar="FILE", help="read options from this YAML file or URI; flags are stronger")
    group.add_argument(
        "--disable-plugin", action="append", metavar="PLUGIN", help=RunPlan.model_fields["disable_plugin"].description
    )


def full_parser(prog: str, catalog: Catalog, choices: Mapping[str, Any]) -> Parser:
    """A parser with the core's flags and those of the chosen plugins, in groups."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--dataset NAME] [--storage NAME] [--model NAME] [flags]",
        epilog="Each flag is also a key in YAML (--plan FILE, llmft.yaml) and a variable (LLMFT_STORAGE_BUCKET). "
        "Flags of other plugins: `llmft plugins NAME`.",
    )
    add_program_flags(parser)
    choosing = parser.add_argument_group("what and where")
    for kind in (*SELECTORS, "tracker"):
        names = [name for family in catalog.families() for name in family.names] if kind == "model" else None
        there_are = ", ".join(names or catalog.names(kind))
        field = RunPlan.model_fields[kind]
        text = f"{field.description} ({there_are}{', a hub id, a folder or a URI' if kind == 'model' else ''})"
        default = field.default
        if isinstance(default, dict):
            text += f" [{default['name']}]"
        elif kind == "model":
            text += f" [{default.name}]"
        if kind == "tracker":
            choosing.add_argument(
                "--tracker", dest=kind, action="append", metavar="NAME", default=argparse.SUPPRESS, help=text
            )
        else:
            path = f"{kind}.name"
            choosing.add_argument(
                f"--{kind}", f"--{path}", dest=path, metavar="NAME", default=argparse.SUPPRESS, help=_escaped(text)
            )
    training = parser.add_argument_group("training")
    nested: dict[str, Any] = {"model": choosing}
    for path, field in leaves(RunPlan):
        if path in (*KINDS, "model.name", "backends", "disable-plugin"):
            continue
        prefix = path.split(".")[0]
        if "." in path and prefix not in nested:
            nested[prefix] = parser.add_argument_group(RunPlan.model_fields[prefix].description or prefix)
        _add_flag(nested.get(prefix, training) if "." in path else training, path, field)
    for prefix, options in chosen_options(catalog, choices).items():
        hidden = prefix.startswith("backends.")
        group: Any = parser
        if not hidden and options.model_fields:
            name = chosen_name(prefix, choices)
            summary = catalog.entry(prefix, name).extension.summary
            group = parser.add_argument_group(f"{prefix} {name}: {summary}")
        for path, field in leaves(options, prefix):
            _add_flag(group, path, field, hidden=hidden)
    return parser


def add_backend_flags(parser: argparse.ArgumentParser, catalog: Catalog) -> None:
    """`--backends.NAME.OPTION` of every storage backend: how a URI is reached that is not in the run's storage."""
    group = parser.add_argument_group("how a URI is reached")
    for entry in catalog.entries:
        if entry.kind == "storage":
            for path, field in leaves(entry.extension.options_type, f"backends.{entry.name}"):
                _add_flag(group, path, field)


def add_storage_flags(parser: argparse.ArgumentParser, catalog: Catalog, choices: Mapping[str, Any]) -> None:
    """`--storage NAME` and the options of the storage that is chosen."""
    group = parser.add_argument_group("storage")
    group.add_argument(
        "--storage", metavar="NAME", help=f"where runs are written ({', '.join(catalog.names('storage'))})"
    )
    for prefix, options in chosen_options(catalog, choices).items():
        if prefix == "storage":
            for path, field in leaves(options, prefix):
                _add_flag(group, path, field)


def _add_flag(group: Any, path: str, field: Any, *, hidden: bool = False) -> None:
    kind = type_name(field.annotation)
    default = default_text(field)
    text = (
        f"{field.description} [{default}]"
        if default not in ("none", '""', "[]", "{}", "required")
        else str(field.description)
    )
    settings: dict[str, Any] = {"dest": path, "default": argparse.SUPPRESS}
    settings["help"] = argparse.SUPPRESS if hidden else _escaped(text)
    if kind.startswith("list of "):
        settings["action"] = "append"
    if kind == "true or false":
        group.add_argument(f"--{path}", action=argparse.BooleanOptionalAction, **settings)
        return
    if kind.startswith("one of "):
        settings["metavar"] = "{" + kind.removeprefix("one of ").replace(", ", ",") + "}"
    else:
        settings["metavar"] = {"int": "N", "float": "X"}.get(kind, "VALUE")
    group.add_argument(f"--{path}", **settings)


def chosen_name(kind: str, choices: Mapping[str, Any]) -> str:
    """The plugin of a kind that a merged plan chooses, or the default, or nothing."""
    chosen = choices.get(kind)
    chosen = chosen if isinstance(chosen, Mapping) else {}
    return str({**(RunPlan.model_fields[kind].default or {}), **chosen}.get("name", ""))


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _names(value: Any) -> list[str]:
    values = value.split(",") if isinstance(value, str) else value
    return [str(item).strip() for item in values if str(item).strip()]


def unknown_flags(
    extra: Sequence[str], paths: list[str], catalog: Catalog, choices: Mapping[str, Any]
) -> list[Problem]:
    """A problem for each word of argv that nothing took."""
    problems = []
    after_flag = False
    # Options of a plugin that does not exist: its misspelt name is the problem.
    misnamed = {kind for kind in SINGLE_KINDS if chosen_name(kind, choices) not in ("", *catalog.names(kind))}
    for word in extra:
        if word.startswith("-") and not word.lstrip("-").replace(".", "").isdigit():
            path = word.lstrip("-").split("=")[0]
            if path.split(".")[0] in misnamed:
                after_flag = "=" not in word
                continue
            problems.append(Problem(word.split("=")[0], _why_unknown(path, paths, catalog, choices)))
            after_flag = "=" not in word
        elif after_flag:
            after_flag = False  # the value of the flag that was just reported
        else:
            problems.append(Problem(word, "is not a flag: options are written --NAME VALUE"))
    return problems


def _why_unknown(path: str, paths: list[str], catalog: Catalog, choices: Mapping[str, Any]) -> str:
    elsewhere = plugins_options(catalog, choices)
    if path in elsewhere:
        return f"{elsewhere[path]}: add --{path.split('.')[0]} NAME"
    flags = [*paths, *(path.removesuffix(".name") for path in paths if path.endswith(".name"))]
    return f"no such flag{close_match(path, flags)}; `--help` lists the flags of the chosen plugins"
