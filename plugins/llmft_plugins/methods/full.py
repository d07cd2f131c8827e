"""Full fine-tuning: every weight of the model is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmft_core import Method, Setting, hookimpl

if TYPE_CHECKING:
    import torch

llmft_api = 1


class Full(Method):
    """Everything is trained, also what a model arrives with frozen."""

    name = "full"
    summary = "every weight is trained"

    def apply(self, model: torch.nn.Module, setting: Setting) -> torch.nn.Module:
        """The same model, all of it trained."""
        return model.requires_grad_(True)


@hookimpl
def llmft_methods() -> list[type[Method]]:
    """Full fine-tuning."""
    return [Full]
