"""From a node's model folder to the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmft_core.errors import LlmftError
from llmft_core.extensions import Engine
from llmft_core.train.job import Job
from llmft_core.train.sliced import load_sliced
from llmft_core.train.tensor_map import map_tensors, refuse
from llmft_core.weights.tensors import TensorFiles

KINDS = ("missing_keys", "mismatched_keys", "unexpected_keys")
Warn = Callable[[str], None]
"""Takes a line of what a user should know of the loading."""


def build_model(
    job: Job, engine: Engine, warn: Warn = lambda text: None, loading: Mapping[str, Any] | None = None
) -> torch.nn.Module:
    """Load the weights in the engine's context and make room for the tokenizer's added tokens. Collective. `loading`:
    what the method says to transformers of weights that will be frozen.

    Raises LlmftError if a weight is missing, left over or has another shape: such a model would train from random
    numbers, or not be the model of the folder.
    """
    model = load(job.model, engine, warn, loading or {})
    add_tokens(model, job.vocabulary, engine)
    make_trainable(model, job)
    return model


def make_trainable(model: torch.nn.Module, job: Job) -> None:
    """Its attention, what it computes again in the backward pass, and dropout: as the plan says. Raises LlmftError."""
    if job.plan.data.packing != "none" and flash_attends(model, job):
        model.set_attn_implementation("flash_attention_2")  # its work grows with the samples, not with the packed row
    if job.plan.gradient_checkpointing:
        recompute(model)
    model.train()


def recompute(model: torch.nn.Module) -> None:
    """Keep the inputs of each block alone, and compute the rest again in the backward pass. Raises LlmftError where the
    model's class has no blocks that can."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise LlmftError(
            f"--gradient-checkpointing: {type(model).__name__} cannot compute activations again in transformers "
            f"{version('transformers')}: leave the flag out; a smaller --micro-batch saves memory too"
        )
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def flash_attends(model: torch.nn.Module, job: Job) -> bool:
    """Whether FlashAttention is installed, and does for this model, device and precision.

    Not where blocks are compiled: it looks at positions within a block, to see where samples begin, and a graph cannot
    depend on values.
    """
    from transformers.utils import is_flash_attn_2_available

    fits = job.placement.device == "cuda" and job.placement.precision in ("bf16", "fp16") and not job.plan.compile
    return fits and bool(getattr(model, "_supports_flash_attn", False)) and is_flash_attn_2_available()


def load(folder: Path, engine: Engine, warn: Warn, loading: Mapping[str, Any]) -> torch.nn.Module:
    """The model with its weights, before anything is changed in it. Collective."""
    fill = engine.filler()
    with TensorFiles(folder) as files:  # also where transformers reads them: a broken file is said in our words
        if fill is None:
            return load_whole(folder, engine, loading)
        try:
            tensor_map = map_tensors(folder, files, engine.parameter_dtype)
            reason = tensor_map.conversion
        except (ImportError, AttributeError, TypeError) as error:  # transformers' rules for renaming are not its API
            reason = f"transformers {version('transformers')} keeps its rules for names elsewhere ({error})"
        if reason:
            warn(f"rank 0 reads the whole model into its memory: {reason}, so it cannot be read in slices")
            return load_whole(folder, engine, {})
        return load_sliced(folder, engine, fill, tensor_map, files)


def load_whole(folder: Path, engine: Engine, loading: Mapping[str, Any]) -> torch.nn.Module:
    """By transformers: every rank maps the files and copies one tensor after the other; under ZeRO-3 rank 0 alone
    reads, into a dictionary of the whole model, and the others take part in scattering it."""
    from transformers import AutoModelForCausalLM

    with engine.building():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            **{"dtype": engine.parameter_dtype, **loading},
            use_safetensors=True,  # no pickle is ever read
            local_files_only=True,
            output_loading_info=True,
        )
    refuse(folder, **{kind: map(str, info.get(kind) or ()) for kind in KINDS})
    loaded: torch.nn.Module = model
    return loaded


def add_tokens(model: torch.nn.Module, vocabulary: int, engine: Engine) -> None:
    """Widen the embeddings for added tokens; new rows are the mean of the old ones, on every rank alike.

    The mean keeps the new tokens' logits in the middle of the others', so that the first steps do not blow up
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). A model that has more rows than
    the tokenizer has entries keeps them: they are its padding.
    """
    embedding = model.get_input_embeddings()
    old = embedding.num_embeddings
    if vocabulary <= old:
        return
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight for layer in layers if layer is not None}  # tied weights once
    with engine.whole(list(weights.values())), torch.no_grad():
        for weight in weights.values():
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)
