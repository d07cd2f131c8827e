"""A user's own DeepSpeed JSON file: read once, kept in the plan, and checked against what the plan decides."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmft_core import Placement, Problem, close_match

AUTO = "auto"
"""transformers' and accelerate's word in such files for what they fill in; here: what the plan says."""
SILENT: tuple[Any, ...] = (AUTO, None, {})
"""Values that say nothing: the plan's stays."""

DECIDED = {
    "train_batch_size": "--global-batch",
    "train_micro_batch_size_per_gpu": "--micro-batch",
    "gradient_accumulation_steps": "--global-batch, --micro-batch and --workers",
    "gradient_clipping": "--max-grad-norm",
    "bf16.enabled": "--precision",
    "fp16.enabled": "--precision",
    "zero_optimization.stage": "--strategy",
    "zero_optimization.offload_optimizer.device": "--strategy.offload-optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "--strategy.nvme-path",
    "zero_optimization.offload_param.device": "--strategy.offload-params",
    "zero_optimization.offload_param.nvme_path": "--strategy.nvme-path",
    "zero_optimization.reduce_bucket_size": "--strategy.bucket-size",
    "zero_optimization.allgather_bucket_size": "--strategy.bucket-size",
    "zero_optimization.stage3_prefetch_bucket_size": "--strategy.prefetch-size",
}
"""DeepSpeed's key → the flags that decide it. The file may repeat what they say."""

FIXED = {
    "zero_allow_untested_optimizer": (True, "the optimizer is PyTorch's AdamW"),
    "zero_force_ds_cpu_optimizer": (False, "DeepSpeed's CPU Adam does not resume exactly"),
    "fp16.loss_scale": (0, "states remember a dynamic loss scale"),
    "fp16.fp16_master_weights_and_grads": (False, "states and checkpoints are made of fp32 masters"),
    "bf16.bf16_master_weights_and_grads": (False, "states and checkpoints are made of fp32 masters"),
    "bf16.bf16_optimizer_states": (False, "states are made of fp32 moments"),
    "bf16.check_grad_overflow": (True, "a step with a gradient that is no number must not be applied"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "states know an optimizer that is offloaded whole"),
    "zero_optimization.offload_optimizer.super_offload": (
        False,
        "DeepSpeed's CPU Adam does not resume exactly",
    ),
    "zero_optimization.zero_hpz_partition_size": (1, "a second copy of the weights would not follow a resumed state"),
    "zero_optimization.zero_quantized_weights": (False, "the weights would not be those of the checkpoint"),
    "zero_optimization.zero_quantized_gradients": (False, "it was not tried here"),
    "zero_optimization.compute_grad_norm": (True, "gradients are clipped by it"),
}
"""DeepSpeed's key → the only value that does here, and why."""

REFUSED = {
    "optimizer": 'AdamW is set by --lr and --weight-decay: leave the section out, or write "auto" for its values',
    "scheduler": 'the rate is set by --schedule and --warmup-steps: leave it out, or write "auto" for its values',
    "activation_checkpointing": "it has no effect on transformers' models: use --gradient-checkpointing",
    "data_efficiency": "the order of the data is llmft's, and exact to resume",
    "zero_optimization.cpu_offload": "it is DeepSpeed's old word: use --strategy.offload-optimizer cpu",
    "zero_optimization.cpu_offload_param": "it is DeepSpeed's old word: use --strategy.offload-params cpu",
    "zero_optimization.zenflow": "its optimizer steps are not those of AdamW, and not exact to resume",
}
"""What is never taken from a file, and what to do."""

SECTIONS = {
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "data_types": ("grad_accum_dtype",),
}
"""Sections whose unknown keys DeepSpeed would ignore without a word, with the keys that it reads."""

SETTINGS = (
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
)
"""Single settings that a file may have, besides the sections and what the plan decides."""

SINGLE = {*SETTINGS, *(key for key in (*DECIDED, *FIXED) if "." not in key)}
ALLOWED = sorted({*SINGLE, *SECTIONS, "bf16", "fp16", "zero_optimization"})


def read_file(value: Any) -> Any:
    """The content of the JSON file of this path; what is a mapping already (in a saved plan, in YAML) as it is.

    Raises ValueError with the line where it is no JSON object.
    """
    if not isinstance(value, str | Path):
        return value
    if value == "":
        return {}
    path = Path(value).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}): give a DeepSpeed JSON file of this machine") from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text: give a DeepSpeed JSON file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not JSON ({error.msg}): give a DeepSpeed JSON file") from None
    if not isinstance(content, dict):
        raise ValueError("holds no JSON object: give a DeepSpeed JSON file")  # noqa: TRY004 - for pydantic
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python takes the last of two equal keys without a word."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"gives {', '.join(twice)} twice: leave one")
    return dict(pairs)


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value by its dotted path; an empty section is a value."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def says(config: Mapping[str, Any], path: str) -> Any:
    """What a configuration says at a dotted path; None where it says nothing."""
    return next((value for at, value in leaves(config) if at == path and value not in SILENT), None)


def merge_file(file: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """The planned configuration with what the file adds. Sections for the optimizer and the schedule are not in it:
    `file_problems` has seen that they leave all to the plan."""
    merged = copy.deepcopy(dict(planned))
    for path, value in leaves(file):
        *parents, last = path.split(".")
        if value in SILENT or parents[:1] in (["optimizer"], ["scheduler"]):
            continue
        section = merged
        for parent in parents:
            section = section.setdefault(parent, {})
        if parents == ["zero_optimization"] and f"stage3_{last}" in section:
            last = f"stage3_{last}"  # DeepSpeed knows these by two names
        section[last] = value
    return merged


def file_problems(
    file: Mapping[str, Any], planned: Mapping[str, Any], placement: Placement, open_keys: Collection[str]
) -> list[Problem]:
    """All that is wrong with a file for this plan. `planned`: the configuration without it, in which `open_keys` are
    defaults that no flag gave."""
    found = [
        f"{key}: DeepSpeed has no such setting, or llmft does not use it{close_match(key, ALLOWED)}; there are "
        f"{', '.join(ALLOWED)}"
        for key in file
        if key not in (*ALLOWED, *REFUSED)
    ]
    ours = {**dict(leaves(planned)), "train_batch_size": placement.global_batch}
    ours.setdefault("fp16.enabled", False)
    for path, value in leaves(file):
        section, _, key = path.partition(".")
        if value in SILENT:
            continue
        if key and section in SINGLE:
            found.append(f"{path}: {section} is a single value, not a section")
        elif path in DECIDED and path in ours and path not in open_keys and value != ours[path]:
            found.append(
                f"{path} is {_shown(value)} in the file, and {DECIDED[path]} makes it {_shown(ours[path])}: change one "
                f'of them, or write "{AUTO}" in the file'
            )
        elif path in FIXED and value != FIXED[path][0]:
            only, reason = FIXED[path]
            found.append(f"{path} is {_shown(value)} in the file, and must be {_shown(only)}: {reason}")
        elif section in SECTIONS and key not in SECTIONS[section]:
            known = SECTIONS[section]
            found.append(f"{path}: no such key{close_match(key, known)}; there are {', '.join(known)}")
        elif (reason := REFUSED.get(path) or REFUSED.get(section, "")) and key != "type" and value is not False:
            found.append(f"{path} is {_shown(value)} in the file: {reason}")
    if (kind := says(file, "optimizer.type")) not in (None, "AdamW"):
        found.append(f"optimizer.type is {kind} in the file: llmft trains with AdamW")
    found += _section_problems(merge_file(file, planned)) if not found else []
    return [Problem("strategy.config", reason) for reason in found]


def _shown(value: Any) -> str:
    return json.dumps(value)


def _section_problems(merged: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed's own models of its sections say."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, model in models.items():
        if not isinstance(given := merged.get(section, {}), Mapping):
            yield f"{section} is {_shown(given)}: it is a section"
            continue
        try:
            model(**given)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                key = ".".join([section, *map(str, detail["loc"])])
                known = {name for n, f in model.model_fields.items() for name in (n, f.alias) if name}
                if detail["type"] == "extra_forbidden":
                    yield f"{key}: DeepSpeed has no such setting{close_match(str(detail['loc'][-1]), known)}"
                else:
                    yield f"{key} is {_shown(detail['input'])}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"
