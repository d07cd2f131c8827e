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
from llmft_core.testing.engines import check_filling
from llmft_core.values import ModelSize, Placement


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


class MethodContract(ExtensionContract):
    """Fixtures: `extension`; `model`, a small model that the method can work on."""

    @pytest.fixture
    def model(self) -> Any:
        """A model that arrives frozen."""
        from torch import nn

        return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11)).requires_grad_(False)

    def test_something_is_trained(self, extension: Method, model: Any) -> None:
        from torch import nn

        trained = extension.apply(model)
        assert isinstance(trained, nn.Module)
        assert any(parameter.requires_grad for parameter in trained.parameters())


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

    def test_finish_is_safe_at_any_time(self, extension: Tracker, tmp_path: Path, plan: Mapping[str, Any]) -> None:
        """A run may fail before `start`, and the way out may pass `finish` twice."""
        extension.finish()
        extension.start(tmp_path, plan)
        extension.finish()
        extension.finish()

    def test_a_resumed_run_adds_to_what_is_there(
        self, extension: Tracker, tmp_path: Path, plan: Mapping[str, Any]
    ) -> None:
        extension.start(tmp_path, plan)
        extension.log({"train/loss": 2.5}, step=1)
        extension.finish()
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        resumed = type(extension)(extension.options)
        resumed.start(tmp_path, plan)
        resumed.log({"train/loss": 2.4}, step=2)
        resumed.finish()
        for file, content in before.items():
            assert file.read_bytes().startswith(content)
