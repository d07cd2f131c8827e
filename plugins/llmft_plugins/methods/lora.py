"""LoRA: the model is frozen, and a product of two thin matrices is trained beside each of its linear layers.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Dettmers et al. 2023, "QLoRA: Efficient
Finetuning of Quantized LLMs" (4-bit weights, and adapters on all linear layers).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llmft_core import (
    Adapter,
    Device,
    InputError,
    LlmftError,
    Method,
    Options,
    Problem,
    Setting,
    comma_separated,
    hookimpl,
)

if TYPE_CHECKING:
    import torch

llmft_api = 1

PREFIX = "base_model.model."
"""What PEFT's own wrapper of a model puts before every name."""


class LoraOptions(Options):
    """The adapter."""

    rank: int = Field(16, ge=1, description="inner dimension of the two matrices")
    alpha: float | None = Field(None, gt=0, description="their product is scaled by alpha / rank; default: 2 × rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs that is dropped in training")
    target_modules: Annotated[list[str], BeforeValidator(comma_separated)] = Field(
        [],
        description="linear layers that get an adapter (q_proj,v_proj); default: all but the output layer",
    )
    quantize: Literal["none", "nf4"] = Field(
        "none", description="nf4: the frozen weights in 4 bits (QLoRA); NVIDIA GPUs, bitsandbytes, not under zero-3"
    )


class Lora(Method):
    """By the peft library, in its file layout."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank adapters beside frozen weights (peft); QLoRA with --method.quantize nf4"
    options_type: ClassVar[type[Options]] = LoraOptions
    freezes: ClassVar[bool] = True
    # Schulman et al. 2025, "LoRA Without Regret": the best rate is about ten times that of full fine-tuning.
    learning_rate_factor: ClassVar[float] = 10.0

    @property
    def dropout(self) -> float:
        share: float = self.options.dropout
        return share

    def problems(self, setting: Setting) -> list[Problem]:
        if self.options.quantize == "none":
            return []
        reasons = []
        if setting.placement.device != "cuda":
            reasons.append("4-bit weights need an NVIDIA GPU: leave out --method.quantize, or train on GPUs")
        if setting.partitioned:
            why = "4-bit weights are packed bytes with scales beside them, which are not partitioned"
            reasons.append(f"{why}: use --strategy ddp or zero-2, or leave out --method.quantize")
        return [Problem("method.quantize", reason) for reason in reasons]

    def node_problems(self, device: Device) -> list[Problem]:
        if self.options.quantize == "none" or device != "cuda" or importlib.util.find_spec("bitsandbytes") is not None:
            return []
        return [Problem("method.quantize", "4-bit weights need bitsandbytes: pip install 'llmft[qlora]' here")]

    def loading(self, setting: Setting) -> dict[str, Any]:
        """Frozen weights need no fp32 copy: they are held in the type that training computes in."""
        import torch

        types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = types[setting.placement.precision]
        if self.options.quantize == "none":
            return {"dtype": dtype}
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.options.quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        # Quantised as it is read, on this rank's GPU: it cannot be moved there afterwards.
        return {
            "dtype": dtype,
            "quantization_config": quantization,
            "device_map": {"": torch.cuda.current_device()},
        }

    def apply(self, model: torch.nn.Module, setting: Setting) -> torch.nn.Module:
        """The same model, its targets wrapped. All ranks draw the same numbers."""
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        targets = self.options.target_modules or default_targets(model)
        layers = targeted(model, targets)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=setting.base,
            r=self.options.rank,
            lora_alpha=self.options.alpha or 2 * self.options.rank,
            lora_dropout=self.options.dropout,
            target_modules=sorted(targets),
            fan_in_fan_out=not any(isinstance(layer, torch.nn.Linear) for layer in layers),  # GPT-2's Conv1D
            trainable_token_indices=token_rows(model, setting.special_ids),
        )
        with torch.random.fork_rng(devices=[]), embeddings_are_whole():
            torch.manual_seed(setting.seed)
            return inject_adapter_in_model(config, model)

    def adapter(self, model: torch.nn.Module, setting: Setting) -> Adapter:
        """PEFT's names and its adapter_config.json."""
        from peft import get_peft_model_state_dict

        trained = {name: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        named = get_peft_model_state_dict(model, trained, save_embedding_layers=False)  # it only renames keys
        if set(named.values()) != set(trained):
            lost = sorted({*trained} - {*named.values()})
            raise LlmftError(
                f"peft would leave {', '.join(lost[:3])} out of an adapter: use the tested version of peft"
            )
        config = model.peft_config["default"].to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        tensors = {parameter: f"{PREFIX}{name}" for name, parameter in named.items()}
        return Adapter(tensors, {**plain, "inference_mode": True})

    def merge(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """By peft, in the model's own type."""
        from peft import PeftModel

        try:
            with warnings.catch_warnings():  # peft 0.21 calls what transformers 5.23 has renamed
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                adapted = PeftModel.from_pretrained(model, folder)
            merged: torch.nn.Module = adapted.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise LlmftError(
                f"{folder}: the adapter does not fit the base model ({reason}): name its own base"
            ) from error
        return merged


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name → module of all that can get an adapter by its name, the output layer left out."""
    import torch
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)  # quantised layers are derived from Linear
    return {
        name: module for name, module in model.named_modules() if isinstance(module, kinds) and module is not output
    }


def default_targets(model: torch.nn.Module) -> set[str]:
    """The last words of the names of all linear layers but the output layer: `q_proj`, `down_proj`, ….

    A word that the output layer has too stands for it as well, so those layers are named in full."""
    output = model.get_output_embeddings()
    avoided = {name.rpartition(".")[2] for name, module in model.named_modules() if module is output}
    words = {name: name.rpartition(".")[2] for name in linear_layers(model)}
    return {name if word in avoided or word.isdigit() else word for name, word in words.items()}


def targeted(model: torch.nn.Module, targets: Collection[str]) -> list[torch.nn.Module]:
    """The layers that are called so. Raises InputError naming what no linear layer is called."""
    known = linear_layers(model)
    wrong = [t for t in sorted(targets) if not any(name == t or name.endswith(f".{t}") for name in known)]
    if wrong or not known:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in known})) or "none at all"
        what = f"no linear layer of {type(model).__name__} is called {', '.join(wrong)}" if wrong else "no linear layer"
        raise InputError(f"method.target-modules: {what}; there are {there}")
    return [layer for name, layer in known.items() if any(name == t or name.endswith(f".{t}") for t in targets)]


def token_rows(model: torch.nn.Module, ids: tuple[int, ...]) -> dict[str, list[int]] | None:
    """Layer → rows of it that are trained. peft trains those of a tied output layer with the input's."""
    if not ids:
        return None
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if layers[1] is not None and layers[1].weight is layers[0].weight:
        layers.pop()
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: list(ids) for layer in layers if layer is not None}


@contextmanager
def embeddings_are_whole() -> Iterator[None]:
    """Under ZeRO-3 peft gathers embeddings itself to copy rows, and knows no device but CUDA. They are whole here."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    def rows_of(self: Any, weight: torch.Tensor, rows: list[int], embed_dim: int) -> torch.Tensor:
        return weight[rows].clone()

    original = TrainableTokensLayer._collect_token_weights
    TrainableTokensLayer._collect_token_weights = rows_of
    try:
        yield
    finally:
        TrainableTokensLayer._collect_token_weights = original


@hookimpl
def llmft_methods() -> list[type[Method]]:
    return [Lora]
