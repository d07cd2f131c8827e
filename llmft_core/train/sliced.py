"""A partitioned model, filled from its node's files: each rank reads what it holds, and no more."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmft_core.extensions import Engine, FillPartition
from llmft_core.train.tensor_map import TensorMap
from llmft_core.weights.tensors import CHUNK, TensorFiles


def load_sliced(
    folder: Path, engine: Engine, fill: FillPartition, tensor_map: TensorMap, files: TensorFiles
) -> torch.nn.Module:
    """The model of a map without conversions. Collective. Raises LlmftError where a file ends too early."""
    sources = dict(tensor_map.sources)
    untied = []
    for one, other in tensor_map.skeleton.all_tied_weights_keys.items():  # target → source, in the model's names
        if one in sources and other in sources:
            if same_values(files, sources[one], sources[other]):
                del sources[one]
            else:
                untied.append(one)  # as from_pretrained does where nothing is partitioned: the files are the truth
    model = make_empty(tensor_map.skeleton, engine)
    tensors = dict(model.named_parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in sources}
    with torch.no_grad():
        for name, source in sources.items():
            read = partial(files.read, source)
            if name in tensors:
                fill(tensors[name], read)
            else:
                read(0, flat := torch.empty(buffers[name].numel(), dtype=buffers[name].dtype))
                buffers[name].copy_(flat.view(buffers[name].shape))
    for tensor in (*tensors.values(), *buffers.values()):
        tensor._is_hf_initialized = True  # else it gets random values now
    model.initialize_weights()  # buffers that are computed from config.json
    for name in untied:
        model.all_tied_weights_keys.pop(name)
    model.tie_weights(missing_keys=set(model.state_dict()) - sources.keys(), recompute_mapping=False)
    add_generation_config(model, folder)
    made: torch.nn.Module = model
    return made


def make_empty(skeleton: Any, engine: Engine) -> Any:
    """The model with memory for its values, made module by module where the engine partitions as it goes. None of
    the values is computed: initialisation is off in the context that transformers makes models in before loading."""
    cls, dtype = type(skeleton), skeleton.config.dtype
    with ExitStack() as contexts:
        contexts.enter_context(engine.building())
        for context in cls.get_init_context(dtype, False, False, False):
            contexts.enter_context(context)
        return cls(skeleton.config)


def same_values(files: TensorFiles, one: str, other: str) -> bool:
    """Whether two tensors of one shape are equal; each rank compares its share. Collective."""
    answers = [False] * dist.get_world_size()
    total = math.prod(files.tensors[one].shape)  # elements
    share = -(-total // len(answers))
    first = dist.get_rank() * share
    mine = True
    for start in range(first, min(first + share, total), CHUNK // 8):
        count = min(CHUNK // 8, first + share - start, total - start)
        left, right = torch.empty(2, count, dtype=torch.float64)
        files.read(one, start, left)
        files.read(other, start, right)
        mine = mine and torch.equal(left, right)
    dist.all_gather_object(answers, mine)
    return all(answers)


def add_generation_config(model: Any, folder: Path) -> None:
    """What from_pretrained reads besides weights: generation_config.json, or what older models say in config.json."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        return
    model.generation_config = GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", local_files_only=True, _from_model_config=True
    )
