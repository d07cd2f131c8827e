"""Entry points → plugins: what a stranger's package may do wrong without taking the program down."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from llmft_core import Method, hookimpl
from llmft_core.catalog import Catalog
from llmft_core.hookspecs import KINDS, hookspec
from llmft_core.loading import ENTRY_POINT_GROUP, load_plugins

Install = Callable[..., EntryPoint]


class Distribution:
    """As much of an installed distribution as the loader looks at."""

    def __init__(self, name: str, version: str = "1.2") -> None:
        self.name, self.version = name, version


class Nothing(Method):
    """A method that trains what it is given."""

    name = "nothing"
    summary = "as it comes"

    def apply(self, model: Any) -> Any:
        return model


@hookimpl
def llmft_methods() -> list[type[Method]]:
    return [Nothing]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a module with these contents and an entry point to it."""

    def installed(distribution: str, entry: str, **contents: Any) -> EntryPoint:
        module_name = f"fake_{distribution}_{entry}".replace("-", "_")
        module = types.ModuleType(module_name)
        module.__dict__.update({"llmft_api": 1, **contents})
        monkeypatch.setitem(sys.modules, module_name, module)
        return found(distribution, entry, module_name)

    return installed


def found(distribution: str, entry: str, value: str) -> EntryPoint:
    """What discovery returns."""
    return EntryPoint(entry, value, ENTRY_POINT_GROUP)._for(Distribution(distribution))  # type: ignore[attr-defined]


def test_a_plugin_is_loaded(install: Install) -> None:
    plugins = load_plugins(entries=[install("a", "x", llmft_methods=llmft_methods)])
    (record,) = plugins.records
    assert (record.id, record.version, record.state, record.cause) == ("a:x", "1.2", "loaded", "")
    assert plugins.manager.hook.llmft_methods() == [[Nothing]]
    assert plugins.record("a:x") is record


def test_one_entry_name_in_two_distributions_loads_both(install: Install) -> None:
    entries = [install("b", "x", llmft_methods=llmft_methods), install("a", "x", llmft_methods=llmft_methods)]
    plugins = load_plugins(entries=entries)
    assert [(record.id, record.state) for record in plugins.records] == [("a:x", "loaded"), ("b:x", "loaded")]


def test_the_first_of_a_distribution_on_the_path_wins(install: Install) -> None:
    first = install("a", "x", llmft_methods=llmft_methods)
    plugins = load_plugins(entries=[first, found("a", "x", "no_such_module_anywhere")])
    assert [record.state for record in plugins.records] == ["loaded"]


@pytest.mark.parametrize(
    ("disabled", "states"),
    [
        (["a:x"], ["disabled", "loaded", "loaded"]),
        (["a"], ["disabled", "disabled", "loaded"]),
        (["x"], ["disabled", "loaded", "disabled"]),
        (["a:y", "b:x"], ["loaded", "disabled", "disabled"]),
    ],
)
def test_disabling(install: Install, disabled: list[str], states: list[str]) -> None:
    entries = [install(*names, llmft_methods=llmft_methods) for names in (("a", "x"), ("a", "y"), ("b", "x"))]
    assert [record.state for record in load_plugins(disabled, entries).records] == states


def test_disabling_by_the_environment(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFT_DISABLED_PLUGINS", " a:x , b ,")
    entries = [install(*names) for names in (("a", "x"), ("a", "y"), ("b", "x"))]
    assert [record.state for record in load_plugins((), entries).records] == ["disabled", "loaded", "disabled"]


def test_a_disabled_plugin_is_not_imported() -> None:
    (record,) = load_plugins(["broken"], [found("a", "broken", "no_such_module_anywhere")]).records
    assert record.state == "disabled"


def test_a_module_that_is_not_there(install: Install) -> None:
    entries = [found("a", "broken", "no_such_module_anywhere"), install("a", "x", llmft_methods=llmft_methods)]
    broken, fine = load_plugins(entries=entries).records
    assert (broken.state, fine.state) == ("failed", "loaded")
    assert broken.cause == "ModuleNotFoundError: No module named 'no_such_module_anywhere'"


@pytest.mark.parametrize("last_words", ["raise SystemExit(3)", "1 / 0", "raise RuntimeError('two\\nlines')", "def ("])
def test_a_module_that_fails_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: str
) -> None:
    (tmp_path / "fails_at_import.py").write_text(last_words)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fails_at_import", raising=False)
    (record,) = load_plugins(entries=[found("a", "x", "fails_at_import")]).records
    assert record.state == "failed"
    assert "\n" not in record.cause
    assert record.cause.split(":")[0] in ("SystemExit", "ZeroDivisionError", "RuntimeError", "SyntaxError")


def test_a_misspelt_hook_is_an_error_and_offers_nothing(install: Install) -> None:
    @hookimpl
    def llmft_metods() -> list[type[Method]]:
        return [Nothing]

    entry = install("a", "x", llmft_metods=llmft_metods, llmft_methods=llmft_methods)
    plugins = load_plugins(entries=[entry])
    assert plugins.records[0].state == "failed"
    assert "llmft_metods" in plugins.records[0].cause
    assert plugins.manager.hook.llmft_methods() == []


def test_a_hook_with_arguments_it_does_not_get(install: Install) -> None:
    @hookimpl
    def llmft_methods(config: Any) -> list[type[Method]]:
        return [Nothing]

    plugins = load_plugins(entries=[install("a", "x", llmft_methods=llmft_methods)])
    assert plugins.records[0].state == "failed"
    assert "config" in plugins.records[0].cause


@pytest.mark.parametrize(("version", "words"), [(2, "was written for 2"), (None, "does not say which")])
def test_another_api_version_is_refused_in_words(install: Install, version: int | None, words: str) -> None:
    (record,) = load_plugins(entries=[install("a", "x", llmft_api=version)]).records
    assert record.state == "failed"
    assert words in record.cause
    assert "llmft_api = 1" in record.cause


def test_each_call_makes_a_manager_of_its_own(install: Install) -> None:
    entry = install("a", "x", llmft_methods=llmft_methods)
    assert load_plugins(entries=[entry]).manager is not load_plugins(entries=[entry]).manager


def test_every_hook_is_documented_and_used_by_a_built_in() -> None:
    from llmft_core import hookspecs

    specified = {
        name
        for name, value in vars(hookspecs).items()
        if getattr(value, f"{hookspec.project_name}_spec", None) is not None
    }
    assert specified == set(KINDS.values())
    plugins = load_plugins()
    own = {entry.kind for entry in Catalog(plugins).entries if entry.plugin_id.startswith("llmft:")}
    assert own == set(KINDS)
    for hook in specified:
        text = getattr(hookspecs, hook).__doc__
        assert text
        assert "Used by `" in text
