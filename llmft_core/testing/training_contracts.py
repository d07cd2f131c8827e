"""Contract suites of the kinds that take part in training: strategies, methods, models and trackers."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llmft_core.errors import Problem
from llmft_core.extensions import Method, ModelFamily, Strategy, Tracker
from llmft_core.testing.contracts import ExtensionContract
from llmft_core.testing.engines import SIZES, check_filling, check_refusals
from llmft_core.values import ModelSize, Placement, Setting


class StrategyContract(ExtensionContract):
    """The half that runs on the driver. Fixtures: `extension`; `placements`, at least one of which it can do."""

    @pytest.fixture
    def placements(self) -> list[Placement]:
        """Layouts that the strategy is asked about."""
        return [
            Placement(ranks, device, precision, micro_batch=2, accumulation=3, max_grad_norm=1.0)
            for ranks in (1, 2, 8)
            for device in ("cpu", "cuda")
            for precision in ("fp32", "bf16", "fp16")
        ]

    def test_problems_say_what_to_change(self, extension: Strategy, placements: list[Placement]) -> None:
        for placement in placements:
            problems = extension.problems(placement)
            assert problems == extension.problems(placement)
            for problem in problems:
                assert isinstance(problem, Problem)
                assert problem.path, "the flag that it belongs to"
                assert problem.reason
                assert "\n" not in problem.reason

    def test_whether_states_can_be_taken_is_said_in_one_line(self, extension: Strategy) -> None:
        reason = extension.state_problem()
        assert isinstance(reason, str)
        assert "\n" not in reason

    def test_it_can_do_something(self, extension: Strategy, placements: list[Placement]) -> None:
        assert any(not extension.problems(placement) for placement in placements)

    def test_configuration_is_plain_data(self, extension: Strategy, placements: list[Placement]) -> None:
        for placement in placements:
            if not extension.problems(placement):
                configuration = extension.configuration(placement)
                assert json.loads(json.dumps(configuration, allow_nan=False)) == configuration
                assert configuration == type(extension)(extension.options).configuration(placement)

    def test_engines_fill_each_parameter_with_its_own_values(
        self, extension: Strategy, placements: list[Placement]
    ) -> None:
        """Starts two gloo processes, if the strategy can do two ranks on CPU in fp32."""
        wanted = [p for p in placements if (p.world_size, p.device, p.precision) == (2, "cpu", "fp32")]
        possible = [placement for placement in wanted if not extension.problems(placement)]
        if not possible:
            pytest.skip("no placement with two ranks on CPU in fp32")
        check_filling(type(extension), extension.options, possible[0])

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_a_step_that_is_not_finite_is_refused_on_all_ranks(
        self, extension: Strategy, placements: list[Placement], precision: str
    ) -> None:
        """Starts two gloo processes, or one where the strategy cannot do two on CPU."""
        on_cpu = [p for p in placements if (p.device, p.precision) == ("cpu", precision) and p.world_size <= 2]
        possible = [placement for placement in on_cpu if not extension.problems(placement)]
        if not possible:
            pytest.skip(f"no placement with one or two ranks on CPU in {precision}")
        check_refusals(type(extension), extension.options, max(possible, key=lambda p: p.world_size))


class MethodContract(ExtensionContract):
    """Fixtures: `extension`; `model`, a small model that the method can work on."""

    @pytest.fixture
    def model(self) -> Any:
        """A tiny Llama that arrives frozen."""
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**SIZES)).requires_grad_(False)

    @pytest.fixture
    def setting(self) -> Setting:
        """One rank on CPU; two special tokens."""
        placement = Placement(1, "cpu", "fp32", micro_batch=2, accumulation=1, max_grad_norm=1.0)
        return Setting(placement, partitioned=False, special_ids=(9, 10), seed=3, base="owner/model")

    def test_problems_say_what_to_change(self, extension: Method, setting: Setting) -> None:
        for problem in extension.problems(setting):
            assert problem.path.startswith("method")
            assert problem.reason
            assert "\n" not in problem.reason

    def test_something_is_trained(self, extension: Method, model: Any, setting: Setting) -> None:
        from torch import nn

        trained = extension.apply(model, setting)
        assert isinstance(trained, nn.Module)
        assert any(parameter.requires_grad for parameter in trained.parameters())

    def test_it_begins_with_the_same_numbers_everywhere(self, extension: Method, model: Any, setting: Setting) -> None:
        """Ranks do not tell each other what they drew, and the caller's random numbers go on as if nothing was."""
        import torch

        other = copy.deepcopy(model)
        torch.manual_seed(1)
        first = dict(extension.apply(model, setting).named_parameters())
        went_on = torch.rand(1)
        torch.manual_seed(1)
        assert went_on == torch.rand(1)
        second = dict(type(extension)(extension.options).apply(other, setting).named_parameters())
        assert first.keys() == second.keys()
        for name, parameter in first.items():
            assert torch.equal(parameter, second[name]), name

    def test_an_adapter_is_all_that_is_trained(self, extension: Method, model: Any, setting: Setting) -> None:
        trained = extension.apply(model, setting)
        adapter = extension.adapter(trained, setting)
        assert (adapter is not None) or type(extension).merge is Method.merge
        if adapter is not None:
            assert extension.freezes
            assert type(extension).merge is not Method.merge
            names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
            assert set(adapter.tensors) == names
            assert len(set(adapter.tensors.values())) == len(names)
            assert json.loads(json.dumps(adapter.config)) == adapter.config


class ModelFamilyContract(ExtensionContract):
    """Fixtures: `extension`; `config`, the config.json of a model that belongs to the family."""

    @pytest.fixture
    def config(self) -> dict[str, Any]:
        """A small Llama."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 512,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
        }

    def test_its_options_have_defaults(self, extension: ModelFamily) -> None:
        """A model is chosen by its own name, so nothing can be said to its family."""
        extension.options_type()

    def test_each_name_leads_to_a_model(self, extension: ModelFamily) -> None:
        assert len(set(extension.names)) == len(extension.names)
        for name in extension.names:
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name), "not to be taken for a hub id or a path"
            hub_id = extension.hub_id(name)
            if hub_id is None:
                assert type(extension).build is not ModelFamily.build, f"{name} has neither a hub id nor `build`"
            else:
                assert re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id)
            assert 0 < extension.learning_rate(name) < 1

    def test_it_claims_its_own_and_nothing_else(self, extension: ModelFamily, config: dict[str, Any]) -> None:
        assert extension.claims(config) is True
        if not extension.fallback:
            assert extension.claims({}) is False
            assert extension.claims({"model_type": "no-such-model"}) is False

    def test_size_comes_from_the_config_alone(self, extension: ModelFamily, config: dict[str, Any]) -> None:
        before = copy.deepcopy(config)
        size = extension.size(config)
        assert isinstance(size, ModelSize)
        assert 0 < size.matmul_parameters <= size.parameters
        assert config == before


class TrackerContract(ExtensionContract):
    """Fixtures: `extension`; `plan`, what a run would hand over."""

    @pytest.fixture
    def plan(self) -> Mapping[str, Any]:
        """A part of a plan."""
        return {"name": "x", "dataset": {"name": "arithmetic", "seed": 0}, "lr": None}

    def test_a_run_is_watched_to_its_end(self, extension: Tracker, tmp_path: Path, plan: Mapping[str, Any]) -> None:
        extension.start(tmp_path, plan)
        extension.log({"train/loss": 2.5, "train/tokens": 1024}, step=1)
        extension.log({"train/loss": float("nan"), "eval/perplexity": float("inf")}, step=2)
        extension.log({}, step=3)
        extension.finish()

    def test_problems_are_told_before_the_run(self, extension: Tracker) -> None:
        """Here everything is installed and nobody is asked to log in."""
        assert extension.problems() == []

    def test_finish_is_safe_at_any_time(self, extension: Tracker, tmp_path: Path, plan: Mapping[str, Any]) -> None:
        """A run may fail before `start`, and the way out may pass `finish` twice."""
        extension.finish()
        extension.start(tmp_path, plan)
        extension.finish()
        extension.finish()

    @pytest.mark.parametrize("by_user", [True, False])
    def test_a_run_may_be_broken_off(
        self, extension: Tracker, tmp_path: Path, plan: Mapping[str, Any], by_user: bool
    ) -> None:
        """What was logged is kept, and the run can go on."""
        extension.start(tmp_path, plan)
        extension.log({"train/loss": 2.5}, step=1)
        extension.break_off(by_user=by_user)
        before = {file: file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()}
        resumed = type(extension)(extension.options)
        resumed.resume(tmp_path, plan, step=1)
        resumed.finish()
        for file, size in before.items():
            assert file.stat().st_size >= size

    def test_a_resumed_run_adds_to_what_is_there(
        self, extension: Tracker, tmp_path: Path, plan: Mapping[str, Any]
    ) -> None:
        extension.start(tmp_path, plan)
        extension.log({"train/loss": 2.5}, step=1)
        extension.finish()
        before = {file: file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()}
        resumed = type(extension)(extension.options)
        resumed.start(tmp_path, plan)
        resumed.log({"train/loss": 2.4}, step=2)
        resumed.finish()
        for file, size in before.items():  # a database changes in the middle, too
            assert file.stat().st_size >= size
