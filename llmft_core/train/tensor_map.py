"""Which tensor of the files each tensor of the model is, known before any value is read.

Transformers renames tensors as it loads them, and converts some (experts that are stored one by one and trained as
one). What it only renames can be read slice by slice; a conversion cannot, and is not imitated here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmft_core.errors import LlmftError
from llmft_core.weights.tensors import DTYPES, TensorFiles


@dataclass(frozen=True)
class TensorMap:
    """How files and model fit together, in the model's names."""

    skeleton: Any
    """The model on the meta device: shapes, config and class, no values; tied weights are still apart."""
    sources: Mapping[str, str]
    """Tensor of the model → tensor of the files, for all parameters and persistent buffers that the files hold."""
    conversion: str
    """Why the model is not its files' tensors under other names, in words; empty where it is. Then nothing is said of
    the sources."""


def map_tensors(folder: Path, files: TensorFiles, dtype: torch.dtype) -> TensorMap:
    """Raises LlmftError naming tensors that are missing, left over, or of another shape than config.json says."""
    skeleton = make_skeleton(folder, dtype)
    expected = skeleton.state_dict()
    renamed, conversion = rename(skeleton, expected, files.tensors)
    conversion = unusual(folder, skeleton) or conversion
    if conversion:
        return TensorMap(skeleton, {}, conversion)
    sources = {target: source for target, source in renamed.items() if target in expected}
    missing = expected.keys() - sources.keys()
    tied = missing & tied_to_present(skeleton.all_tied_weights_keys, sources)
    optional = {name for name in missing - tied if matches(name, skeleton._keys_to_ignore_on_load_missing)}
    absent = missing - tied - optional
    computed = {name for name, _ in skeleton.named_buffers()} - expected.keys()  # from config.json, not from files
    ignored = [*(skeleton._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    extra = {target for target in renamed.keys() - sources.keys() - computed if not matches(target, ignored)}
    mismatched = {
        f"{target} {list(files.tensors[source].shape)} instead of {list(expected[target].shape)}"
        for target, source in sources.items()
        if files.tensors[source].shape != tuple(expected[target].shape)
    }
    refuse(folder, missing_keys=absent, mismatched_keys=mismatched, unexpected_keys=extra)
    if optional:
        return TensorMap(skeleton, {}, f"it makes {min(optional)} up, which the files leave out")
    return TensorMap(skeleton, sources, "")


def make_skeleton(folder: Path, dtype: torch.dtype) -> Any:
    """The model that config.json describes, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights, no_tie_weights
    from transformers.modeling_utils import set_zero3_state

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with ExitStack() as contexts:
        contexts.enter_context(torch.device("meta"))
        # set_zero3_state: under ZeRO-3 transformers would partition the skeleton.
        for context in (meta_device_safe_creation_ops, no_init_weights, no_tie_weights, set_zero3_state):
            contexts.enter_context(context())
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    skeleton.config.name_or_path = str(folder)
    return skeleton


def rename(model: Any, expected: Mapping[str, torch.Tensor], stored: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Tensor of the model → tensor of the files by transformers' own rules, and why these do not suffice, or ""."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    if len(renamings) + len(converters) < len(rules):
        return {}, "transformers loads it by rules of a kind that is unknown here"
    found: dict[str, str] = {}
    for source in sorted(stored, key=dot_natural_key):  # some rules count on this order
        target, converter = rename_source_key(source, renamings, converters, model.base_model_prefix, dict(expected))
        if converter is not None:
            return {}, f"transformers converts {source}"
        if target in found:
            return {}, f"{found[target]} and {source} are both {target}"
        if target in expected and not isinstance(expected[target], torch.Tensor):
            return {}, f"{target} is no tensor"
        if target in expected and stored[source].dtype not in DTYPES:
            return {}, f"{source} is of type {stored[source].dtype}"
        found[target] = source
    return found, ""


def unusual(folder: Path, skeleton: Any) -> str:
    """What from_pretrained does beyond reading tensors into a model, or ""."""
    if getattr(skeleton.config, "quantization_config", None):
        return "its weights are quantised"
    if (folder / "adapter_config.json").is_file():
        return "there is an adapter with it"
    if getattr(skeleton.config, "transformers_weights", None) or getattr(type(skeleton.config), "extra_files", None):
        return "config.json names other files"
    return ""


def tied_to_present(tied: Mapping[str, str], present: Iterable[str]) -> set[str]:
    """All names of groups of tied weights (target → source) of which at least one is in the files."""
    there = set(present)
    groups: dict[str, set[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, {source}).add(target)
    return {name for group in groups.values() if group & there for name in group}


def refuse(folder: Path, **wrong: Iterable[str]) -> None:
    """LlmftError naming the first of each kind, where there are any."""
    found = {kind.replace("_", " "): sorted(names) for kind, names in wrong.items()}
    parts = [
        f"{kind}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for kind, names in found.items()
        if names
    ]
    if parts:
        raise LlmftError(f"{folder}: the weights do not fit config.json ({'; '.join(parts)}): check the model folder")


def matches(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether one of a model's patterns is found in a tensor's name."""

    return any(re.search(pattern, name) for pattern in patterns or ())
