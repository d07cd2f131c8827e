"""Any other causal language model that transformers knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llmft_core import InputError, ModelFamily, ModelSize, hookimpl

llmft_api = 1


class Auto(ModelFamily):
    """Asked when no other family claims a model: what is special about it is not known here."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "any causal language model of transformers, by folder, URI or hub id"
    fallback: ClassVar[bool] = True

    def hub_id(self, name: str) -> str | None:
        return None

    def claims(self, config: Mapping[str, Any]) -> bool:
        return True

    def size(self, config: Mapping[str, Any]) -> ModelSize:
        """Counted on a model without memory. InputError where transformers has no causal language model for it.

        Parameters of experts that a token does not visit are counted as if it did."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        kind = config.get("model_type")
        known = {key: value for key, value in config.items() if key != "model_type"}
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **known))
        except ValueError as error:
            raise InputError(
                f"model_type {kind}: transformers has no causal language model for it "
                f"({' '.join(str(error).split())[:200]}); choose another model, or a newer transformers"
            ) from error
        output = getattr(model.get_output_embeddings(), "weight", None)
        tables = {  # of which a row is read and nothing multiplied: tokens, positions
            id(module.weight): module.weight
            for module in model.modules()
            if isinstance(module, torch.nn.Embedding) and module.weight is not output
        }
        parameters = sum(parameter.numel() for parameter in model.parameters())  # a shared one is counted once
        matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2)
        products = matrices - sum(table.numel() for table in tables.values())
        return ModelSize(parameters=parameters, matmul_parameters=products)


@hookimpl
def llmft_model_families() -> list[type[ModelFamily]]:
    return [Auto]
