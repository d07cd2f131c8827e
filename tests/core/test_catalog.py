"""(kind, name) → class: every way to miss is an error that names the way out."""

from __future__ import annotations

from typing import Any

import pluggy
import pytest
from pydantic import Field

from llmft_core import InputError, Method, ModelFamily, ModelSize, Options, Problems, StorageBackend, hookimpl
from llmft_core import hookspecs as hooks
from llmft_core.catalog import KIND_BASES, Catalog
from llmft_core.loading import LoadedPlugins, PluginRecord


def method(method_name: str, options: type[Options] = Options) -> type[Method]:
    """A method class."""

    class Made(Method):
        name = method_name
        summary = "made for a test"
        options_type = options

        def apply(self, model: Any) -> Any:
            return model

    return Made


def backend(backend_name: str, its_scheme: str) -> type[StorageBackend]:
    """A storage backend class."""

    class Made(StorageBackend):
        name = backend_name
        summary = "made for a test"
        scheme = its_scheme

        def filesystem(self) -> Any:
            raise NotImplementedError

        def root(self) -> str:
            return ""

    return Made


class Plugin:
    """A plugin that offers what it is given."""

    def __init__(self, methods: Any = (), backends: Any = (), families: Any = ()) -> None:
        self.methods, self.backends, self.families = methods, backends, families

    @hookimpl
    def llmft_methods(self) -> Any:
        if isinstance(self.methods, Exception):
            raise self.methods
        return self.methods

    @hookimpl
    def llmft_storage_backends(self) -> Any:
        return self.backends

    @hookimpl
    def llmft_model_families(self) -> Any:
        return self.families


def catalog(records: tuple[PluginRecord, ...] = (), **plugins: Plugin) -> Catalog:
    """A catalogue of plugins by distribution; each has one entry, `x`."""
    manager = pluggy.PluginManager("llmft")
    manager.add_hookspecs(hooks)
    for distribution, plugin in plugins.items():
        manager.register(plugin, name=f"{distribution}:x")
    loaded = tuple(PluginRecord(distribution, "1", "x", "loaded") for distribution in plugins)
    return Catalog(LoadedPlugins(manager, (*loaded, *records)))


def test_a_name_leads_to_its_class() -> None:
    full = method("full")
    entry = catalog(a=Plugin([full, method("lora")])).entry("method", "full")
    assert (entry.extension, entry.plugin_id, entry.state) == (full, "a:x", "loaded")


def test_an_unknown_name_gets_a_suggestion_and_what_there_is() -> None:
    with pytest.raises(InputError, match=r"no method is called ful \(did you mean full\?\); there are full, lora;"):
        catalog(a=Plugin([method("full"), method("lora")])).entry("method", "ful")


def test_an_unknown_name_names_the_plugins_that_might_have_had_it() -> None:
    records = (
        PluginRecord("b", "1", "y", "failed", "ImportError: no libfoo"),
        PluginRecord("c", "1", "z", "disabled"),
    )
    with pytest.raises(InputError) as caught:
        catalog(records, a=Plugin([method("full")]), d=Plugin(ValueError("two\nlines"))).entry("method", "foo")
    for words in (
        "plugin b:y could not be loaded (ImportError: no libfoo)",
        "plugin c:z is disabled",
        "plugin d:x is broken (llmft_methods: ValueError: two lines)",
        "`llmft plugins` lists all",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_name_in_two_plugins_is_an_error_only_when_it_is_used() -> None:
    both = catalog(a=Plugin([method("full")]), b=Plugin([method("full"), method("lora")]))
    assert both.entry("method", "lora").state == "loaded"
    assert both.names("method") == ["full", "lora"]
    with pytest.raises(InputError, match="method full is offered by a:x and b:x: disable one with --disable-plugin"):
        both.entry("method", "full")


def test_one_scheme_in_two_backends_is_an_error_when_it_is_used() -> None:
    both = catalog(a=Plugin(backends=[backend("one", "st")]), b=Plugin(backends=[backend("two", "st")]))
    with pytest.raises(InputError, match=r"st:// is read by one \(a:x\) and two \(b:x\): disable one"):
        both.backend_for("st")


def test_a_scheme_leads_to_its_backend() -> None:
    one = backend("one", "disk")
    made = catalog(a=Plugin(backends=[one, backend("other", "ot")]))
    assert made.backend_for("disk") is one
    with pytest.raises(InputError, match=r"no storage backend reads dsk:// \(did you mean disk\?\)"):
        made.backend_for("dsk")


class WithoutSummary(Method):
    name = "half"

    def apply(self, model: Any) -> Any:
        return model


class WithoutApply(Method):
    name = "half"
    summary = "its method is missing"


class NeedsOptions(ModelFamily):
    name = "family"
    summary = "cannot be told what it needs"

    class options_type(Options):  # noqa: N801 - the contract's name
        size: int = Field(description="required")

    def hub_id(self, name: str) -> str | None:
        return None

    def claims(self, config: Any) -> bool:
        return False

    def size(self, config: Any) -> ModelSize:
        return ModelSize(1, 1)


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (Plugin([WithoutSummary]), "WithoutSummary does not define summary"),
        (Plugin([WithoutApply]), "WithoutApply does not define apply()"),
        (Plugin([backend("disk", "d")]), "is not a class derived from Method"),
        (Plugin([method("full")(Options())]), "is not a class derived from Method"),
        (Plugin([method("full"), method("full")]), "offers full more than once"),
        (Plugin(7), "not iterable"),
        (Plugin(families=[NeedsOptions]), "size Field required"),
    ],
)
def test_what_cannot_be_used_is_a_fault_of_its_plugin(plugin: Plugin, words: str) -> None:
    made = catalog(a=plugin, b=Plugin([method("fine")]))
    assert words in made.faults["a:x"]
    assert made.names("method") == ["fine"]


def test_create_validates_options_and_reports_all_problems_together() -> None:
    class Tuned(Options):
        rank_size: int = Field(8, gt=0, description="rank")
        share: float = Field(0.5, le=1, description="share")

    made = catalog(a=Plugin([method("lora", Tuned)]))
    assert made.create("method", {"name": "lora", "rank-size": "4"}).options == Tuned.model_validate({"rank-size": 4})
    with pytest.raises(Problems) as caught:
        made.create("method", {"name": "lora", "rank-size": 0, "share": 2, "rank-sise": 1})
    assert {problem.path for problem in caught.value.problems} == {
        "method.rank-size",
        "method.share",
        "method.rank-sise",
    }
    assert "method.rank-sise: no such option (did you mean rank-size?); there are rank-size, share" in str(caught.value)
    assert "method.rank-size: 0: input should be greater than 0" in str(caught.value)


def test_every_kind_has_a_base_and_a_hook() -> None:
    assert list(KIND_BASES) == list(hooks.KINDS)


def test_families_of_last_resort_come_last() -> None:
    class Any_(NeedsOptions):  # noqa: N801
        name = "any"
        fallback = True
        options_type = Options  # type: ignore[assignment]

    class Special(Any_):
        name = "special"
        fallback = False

    made = catalog(a=Plugin(families=[Any_, Special]))
    assert [family.name for family in made.families()] == ["special", "any"]
