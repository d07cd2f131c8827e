"""Layers → one frozen plan: precedence, options of plugins, all errors together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pluggy
import pytest
from pydantic import Field, ValidationError

from llmft_core import (
    DatasetFormat,
    InputError,
    Method,
    ModelFamily,
    ModelSize,
    Options,
    Problems,
    StorageBackend,
    Strategy,
    Tracker,
    hookimpl,
    hookspecs,
)
from llmft_core.catalog import Catalog
from llmft_core.loading import LoadedPlugins, PluginRecord
from llmft_core.plan import RunPlan
from llmft_core.plan_layers import Layer, chosen_options, family_of_name, merge, resolve


class RowOptions(Options):
    rows: int = Field(10, gt=0, description="rows")


class Rows(DatasetFormat):
    name, summary, options_type = "arithmetic", "rows", RowOptions

    def parse(self, row: Mapping[str, Any]) -> Any:
        raise NotImplementedError


class OtherRows(Rows):
    name = "other"


class DiskOptions(Options):
    root: str = Field("runs", description="folder")
    part_size: int = Field(8, description="MiB")


class Disk(StorageBackend):
    name, summary, scheme, options_type = "local", "disk", "file", DiskOptions

    def filesystem(self) -> Any:
        raise NotImplementedError

    def root(self) -> str:
        if not self.options.root:
            raise InputError("give --storage.root")
        return str(self.options.root)


class Cloud(Disk):
    name, scheme = "cloud", "cloud"


class Ddp(Strategy):
    name, summary = "ddp", "ddp"

    def engine(self, placement: Any, rank: int) -> Any:
        raise NotImplementedError


class Full(Method):
    name, summary = "full", "full"

    def apply(self, model: Any) -> Any:
        return model


class Lines(Tracker):
    name, summary, options_type = "jsonl", "lines", RowOptions

    def start(self, folder: Any, plan: Any) -> None: ...
    def log(self, metrics: Any, step: int) -> None: ...
    def finish(self) -> None: ...


class Llama(ModelFamily):
    name, summary, names = "llama2", "llama", ("llama-2-tiny", "llama-2-7b")

    def hub_id(self, name: str) -> str | None:
        return f"meta-llama/{name}"

    def claims(self, config: Any) -> bool:
        return False

    def size(self, config: Any) -> ModelSize:
        return ModelSize(1, 1)


class Everything:
    """A plugin with one extension a kind, and two datasets."""

    llmft_dataset_formats = hookimpl(lambda self: [Rows, OtherRows], specname="llmft_dataset_formats")
    llmft_storage_backends = hookimpl(lambda self: [Disk, Cloud], specname="llmft_storage_backends")
    llmft_strategies = hookimpl(lambda self: [Ddp], specname="llmft_strategies")
    llmft_methods = hookimpl(lambda self: [Full], specname="llmft_methods")
    llmft_trackers = hookimpl(lambda self: [Lines], specname="llmft_trackers")
    llmft_model_families = hookimpl(lambda self: [Llama], specname="llmft_model_families")


@pytest.fixture
def catalog() -> Catalog:
    manager = pluggy.PluginManager("llmft")
    manager.add_hookspecs(hookspecs)
    manager.register(Everything(), name="llmft:all")
    made = Catalog(LoadedPlugins(manager, (PluginRecord("llmft", "1", "all", "loaded"),)))
    assert not made.faults
    return made


def flags(**data: Any) -> Layer:
    """The strongest layer; `_` stands for the dash."""
    return Layer("flags", {key.replace("_", "-"): value for key, value in data.items()})


def test_the_later_layer_is_the_stronger_and_sources_are_kept() -> None:
    merged, sources = merge(
        [
            Layer("llmft.yaml", {"lr": 1e-4, "data": {"on-long": "error", "train-on": "all"}, "epochs": 3}),
            Layer("LLMFT_LR", {"lr": 2e-4}),
            flags(lr=3e-4, data={"on-long": "drop"}),
        ]
    )
    assert merged == {"lr": 3e-4, "data": {"on-long": "drop", "train-on": "all"}, "epochs": 3}
    assert sources["lr"] == "flags"
    assert sources["data.on-long"] == "flags"
    assert sources["data.train-on"] == sources["epochs"] == "llmft.yaml"


def test_a_name_is_short_for_a_choice() -> None:
    merged, _ = merge([flags(storage="s3", tracker=["jsonl", {"name": "tensorboard"}], model="llama-2-7b")])
    assert merged["storage"] == {"name": "s3"}
    assert merged["tracker"] == [{"name": "jsonl"}, {"name": "tensorboard"}]
    assert merged["model"] == {"name": "llama-2-7b"}


def test_another_plugin_drops_the_options_of_the_one_it_replaces() -> None:
    weak = Layer("llmft.yaml", {"storage": {"name": "s3", "bucket": "b"}})
    assert merge([weak, flags(storage="local")])[0]["storage"] == {"name": "local"}
    assert merge([weak, flags(storage={"name": "local", "root": "r"})])[0]["storage"] == {"name": "local", "root": "r"}


def test_options_of_the_same_plugin_are_joined() -> None:
    weak = Layer("llmft.yaml", {"storage": {"name": "s3", "bucket": "b"}})
    assert merge([weak, flags(storage="s3")])[0]["storage"] == {"name": "s3", "bucket": "b"}
    assert merge([weak, flags(storage={"prefix": "p"})])[0]["storage"] == {"name": "s3", "bucket": "b", "prefix": "p"}


def test_options_that_name_no_plugin_belong_to_the_one_that_is_chosen() -> None:
    """`LLMFT_DATASET_TRAIN=x llmft run --dataset gsm8k`: dropped without a word, they would be another run."""
    nameless = Layer("environment", {"storage": {"bucket": "b"}})
    assert merge([nameless, flags(storage="s3")])[0]["storage"] == {"name": "s3", "bucket": "b"}
    assert merge([nameless])[0]["storage"] == {"name": "local", "bucket": "b"}
    assert merge([nameless, flags(storage="s3"), flags(storage="local")])[0]["storage"] == {"name": "local"}


def test_layers_are_not_changed_by_merging() -> None:
    weak = Layer("llmft.yaml", {"storage": {"name": "s3", "bucket": "b"}, "tracker": ["jsonl"]})
    before = json.dumps(weak.data)
    merge([weak, flags(storage={"prefix": "p"}), flags(storage="local", tracker=["x"])])
    assert json.dumps(weak.data) == before


def test_defaults_resolve_and_options_are_filled_in(catalog: Catalog) -> None:
    plan = resolve([], catalog)
    assert plan.dataset == {"name": "arithmetic", "rows": 10}
    assert plan.storage == {"name": "local", "root": "runs", "part-size": 8}
    assert plan.tracker == [{"name": "jsonl", "rows": 10}]
    assert plan.strategy is None


def test_options_of_a_default_plugin_need_no_name(catalog: Catalog) -> None:
    plan = resolve([flags(dataset={"rows": "7"}, storage={"root": "elsewhere"})], catalog)
    assert plan.dataset == {"name": "arithmetic", "rows": 7}
    assert plan.storage["root"] == "elsewhere"


def test_all_problems_are_reported_together(catalog: Catalog) -> None:
    given = flags(
        lr=-1,
        dataset={"name": "arithmetic", "rows": 0},
        storage={"name": "local", "rot": "x"},
        strategy="dpp",
        model="llama-2-tny",
        tracker=["jsnl"],
        epoch=3,
        name="a b",
    )
    with pytest.raises(Problems) as caught:
        resolve([given], catalog)
    by_path = {problem.path: problem.reason for problem in caught.value.problems}
    assert set(by_path) == {
        "lr",
        "dataset.rows",
        "storage.rot",
        "strategy",
        "model",
        "tracker",
        "epoch",
        "name",
    }
    assert "did you mean root?" in by_path["storage.rot"]
    assert "did you mean ddp?" in by_path["strategy"]
    assert "did you mean llama-2-tiny?" in by_path["model"]
    assert "did you mean jsonl?" in by_path["tracker"]
    assert "did you mean epochs?" in by_path["epoch"]
    assert all("\n" not in reason for reason in by_path.values())


def test_a_problem_says_which_file_or_variable_it_comes_from(catalog: Catalog) -> None:
    layers = [Layer("llmft.yaml", {"storage": {"rot": "x"}, "lr": 1}), Layer("LLMFT_EPOCHS", {"epochs": "many"})]
    with pytest.raises(Problems) as caught:
        resolve(layers, catalog)
    reasons = {problem.path: problem.reason for problem in caught.value.problems}
    assert reasons["storage.rot"].endswith("(from llmft.yaml)")
    assert reasons["epochs"].endswith("(from LLMFT_EPOCHS)")


def test_a_storage_that_lacks_something_is_a_problem(catalog: Catalog) -> None:
    with pytest.raises(Problems, match=r"^storage: give --storage\.root$"):
        resolve([flags(storage={"root": ""})], catalog)


def test_options_of_other_backends_are_checked_too(catalog: Catalog) -> None:
    plan = resolve([flags(backends={"cloud": {"part-size": 4}})], catalog)
    assert plan.backends == {"cloud": {"root": "runs", "part-size": 4}}
    with pytest.raises(Problems, match=r"backends\.cloud\.part-siz: no such option \(did you mean part-size\?\)"):
        resolve([flags(backends={"cloud": {"part-siz": 4}})], catalog)
    with pytest.raises(Problems, match=r"backends\.local: local is the run's own storage: write --storage"):
        resolve([flags(backends={"local": {"part-size": 4}})], catalog)
    with pytest.raises(Problems, match=r"backends\.locl: no storage is called locl \(did you mean local\?\)"):
        resolve([flags(backends={"locl": {}})], catalog)


@pytest.mark.parametrize("model", ["owner/name", "./folder", "/folder", "s3://bucket/model", "llama-2-7b"])
def test_a_model_is_a_name_a_hub_id_a_folder_or_a_uri(catalog: Catalog, model: str) -> None:
    assert resolve([flags(model=model)], catalog).model.name == model


def test_a_family_is_found_by_the_names_it_offers(catalog: Catalog) -> None:
    family = family_of_name("llama-2-7b", catalog)
    assert family is not None
    assert family.name == "llama2"
    assert family_of_name("owner/name", catalog) is None


def test_a_plan_survives_json(catalog: Catalog) -> None:
    plan = resolve([flags(lr="1e-4", model="llama-2-7b", data={"on-long": "error"}, disable_plugin="a, b:c")], catalog)
    data = json.loads(json.dumps(plan.to_json()))
    assert RunPlan.from_json(data) == plan
    assert data["data"]["on-long"] == "error"
    assert data["lr"] == 1e-4
    assert data["disable-plugin"] == ["a", "b:c"]
    again = resolve([Layer("plan.json", data)], catalog)
    assert again == plan


def test_a_plan_is_frozen(catalog: Catalog) -> None:
    plan = resolve([], catalog)
    with pytest.raises(ValidationError, match="frozen"):
        plan.lr = 1.0  # type: ignore[misc]


def test_chosen_options_follow_the_choice(catalog: Catalog) -> None:
    chosen = chosen_options(catalog, {"dataset": {"name": "other"}, "strategy": {"name": "unknown"}})
    assert chosen["dataset"] is RowOptions
    assert chosen["storage"] is DiskOptions
    assert chosen["backends.local"] is DiskOptions
    assert "strategy" not in chosen


@pytest.mark.parametrize("kind", ["dataset", "storage", "strategy", "method"])
def test_a_choice_needs_to_be_a_name_or_a_mapping(catalog: Catalog, kind: str) -> None:
    with pytest.raises(Problems, match=f"^{kind}: "):
        resolve([Layer("flags", {kind: 7})], catalog)


def test_lists_are_comma_separated_or_repeated(catalog: Catalog) -> None:
    plan = resolve([flags(data={"mix": ["2,0.5", "1"]})], catalog)
    assert plan.data.mix == [2, 0.5, 1]
    assert resolve([flags(data={"mix": "3"})], catalog).data.mix == [3]
    assert resolve([flags(data={"mix": [3, 0.5]})], catalog).data.mix == [3, 0.5]
    with pytest.raises(Problems, match=r"data\.mix\.1: '0': input should be greater than 0"):
        resolve([flags(data={"mix": "1,0"})], catalog)
