"""What is trained, and what a checkpoint of it holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmft_core.errors import Problem
from llmft_core.extensions.base import Extension
from llmft_core.values import Adapter, Setting

if TYPE_CHECKING:
    import torch


class Method(Extension, ABC):
    """What is trained, and what a checkpoint of it holds."""

    freezes: ClassVar[bool] = False
    """Whether the model's own weights stay as they are. Then `apply` is tried on the driver too, on a model of the meta
    device: what it trains is counted, and what it raises is said before anything is started."""
    learning_rate_factor: ClassVar[float] = 1.0
    """Times the model family's learning rate where the plan gives none."""

    @property
    def dropout(self) -> float:
        """Share of values that it drops at random in training. Where a run goes on with other micro-batches, it is said
        that other ones are dropped."""
        return 0.0

    def problems(self, setting: Setting) -> list[Problem]:
        """What cannot be done in this setting, whatever the model is; found before anything is started."""
        return []

    def loading(self, setting: Setting) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained` for weights that will be frozen (`dtype`,
        `quantization_config`). Asked where no weights are partitioned. {}: as the engine trains them."""
        return {}

    @abstractmethod
    def apply(self, model: torch.nn.Module, setting: Setting) -> torch.nn.Module:
        """Choose what is trained (`requires_grad`) and return the model to train, whose forward takes the same
        arguments. Parameters that are made here have the same values on every rank, from `setting.seed` alone; the
        input and output embeddings are whole meanwhile, other weights may be partitioned. Raises InputError where
        the options do not fit the model; its message begins with the option (`method.…:`)."""

    def adapter(self, model: torch.nn.Module, setting: Setting) -> Adapter | None:
        """Of the model that `apply` returned: what checkpoints hold. None: the whole model, in the layout of Hugging
        Face. An adapter needs `merge`."""
        return None

    def merge(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """The base model, with rows for all tokens, made what an adapter in `folder` (adapter_config.json,
        adapter_model.safetensors) makes of it: a plain transformers model with the names of the base. Raises LlmftError
        where the two do not fit."""
        raise TypeError(f"method {self.name} writes adapters, but does not merge them")
