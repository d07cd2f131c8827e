"""A method meets a model: on every rank, and before that on the driver, where no weight is there yet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmft_core.catalog import Catalog
from llmft_core.extensions import Engine, Method, Strategy
from llmft_core.plan import RunPlan
from llmft_core.train.tensor_map import make_skeleton
from llmft_core.values import Placement, Setting
from llmft_core.weights.stage import hub_repository


@dataclass(frozen=True)
class Share:
    """How much of a model is trained."""

    trained: int
    """Parameters."""
    adapter: bool
    """Whether checkpoints hold these alone."""


def setting_of(plan: RunPlan, placement: Placement, special_ids: tuple[int, ...], catalog: Catalog) -> Setting:
    """What the method is told."""
    strategy: Strategy = catalog.create("strategy", plan.strategy or {})
    base = hub_repository(plan.model.name, catalog) or plan.model.name
    return Setting(placement, strategy.partitions_weights, special_ids, plan.seed, base)


def applied(method: Method, model: torch.nn.Module, setting: Setting, engine: Engine) -> torch.nn.Module:
    """The model to train, its trained parameters in the engine's type. Collective."""
    with ExitStack() as contexts:
        if method.freezes:
            contexts.enter_context(engine.whole(embeddings(model)))
        model = method.apply(model, setting)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != engine.parameter_dtype:
            parameter.data = parameter.data.to(engine.parameter_dtype)
    return model.train()


def embeddings(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights of the input and the output embeddings; tied ones once."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(layer.weight): layer.weight for layer in layers if layer is not None}.values())


def trial(method: Method, folder: Path, vocabulary: int, setting: Setting) -> Share:
    """What `method` trains of the model that config.json in `folder` describes. Raises InputError where it cannot."""
    model = make_skeleton(folder, torch.float32)
    model.tie_weights()
    if vocabulary > model.get_input_embeddings().num_embeddings:
        with torch.device("meta"):
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model = method.apply(model, setting)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Share(trained, method.adapter(model, setting) is not None)


def has_dropout(method: Method, config: Mapping[str, Any]) -> bool:
    """Whether training drops values at random: the method does, or the model by its config.json."""
    text = config.get("text_config") or config
    shares = [value for name, value in text.items() if "drop" in name and isinstance(value, float)]
    return method.dropout > 0 or any(share > 0 for share in shares)
