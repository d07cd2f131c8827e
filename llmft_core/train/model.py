"""From a node's model folder to the model that is trained."""

from __future__ import annotations

import torch

from llmft_core.errors import LlmftError
from llmft_core.extensions import Engine
from llmft_core.train.job import Job


def build_model(job: Job, engine: Engine) -> torch.nn.Module:
    """Load the weights in the engine's context and make room for the tokenizer's added tokens.

    Raises LlmftError if a weight is missing or has another shape: such a model would train from random numbers.
    """
    from transformers import AutoModelForCausalLM

    with engine.building():
        model, info = AutoModelForCausalLM.from_pretrained(
            job.model,
            dtype=engine.parameter_dtype,
            use_safetensors=True,  # no pickle is ever read
            local_files_only=True,
            output_loading_info=True,
        )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if wrong:
        listing = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}" for kind, names in wrong.items())
        raise LlmftError(f"{job.model}: the weights do not fit config.json ({listing}): check the model folder")
    add_tokens(model, job.vocabulary, engine)
    if job.plan.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained: torch.nn.Module = model
    return trained


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
