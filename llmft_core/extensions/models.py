"""Families of model architectures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from llmft_core.extensions.base import Extension
from llmft_core.values import ModelSize


class ModelFamily(Extension, ABC):
    """A family of model architectures. The core downloads and loads; the family knows names and peculiarities."""

    names: ClassVar[tuple[str, ...]] = ()
    """Short names it offers for `--model`."""
    fallback: ClassVar[bool] = False
    """True for the family that is asked only when no other claims a model."""
    content_version: ClassVar[str] = "1"
    """Version of what `build` writes: raised with any change of its bytes, so that caches make it anew."""

    @abstractmethod
    def hub_id(self, name: str) -> str | None:
        """The hub repository of a short name; None where the model is made by `build`."""

    @abstractmethod
    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with this config.json belongs to the family."""

    @abstractmethod
    def size(self, config: Mapping[str, Any]) -> ModelSize:
        """Parameter counts from config.json alone."""

    def build(self, name: str, folder: Path) -> None:
        """Write the model of a short name without a hub id into `folder` (config, weights, tokenizer): the same
        bytes on every machine."""
        raise TypeError(f"model family {self.name} offers {name} but neither a hub id nor a way to build it")

    def learning_rate(self, name: str) -> float:
        """Peak learning rate that is used when the plan gives none."""
        return 2e-5

    def load_tokenizer(self, folder: Path) -> Any:
        """A fast `transformers` tokenizer from a model folder, its peculiarities mended."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)

    def chat_template(self, tokenizer: Any) -> str:
        """The Jinja template of this model's chats, for rows that bring no tokens of their own; by default the
        tokenizer's own. Empty where there is none."""
        template = getattr(tokenizer, "chat_template", None)
        return str((template.get("default") if isinstance(template, Mapping) else template) or "")
