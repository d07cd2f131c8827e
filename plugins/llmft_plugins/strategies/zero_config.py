"""What users say of ZeRO, and the DeepSpeed configuration that follows from it and the plan."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmft_core import Options, Placement, Problem
from llmft_plugins.strategies.zero_file import merge_file, read_file, says

SMALLEST_BUCKET = 5_000_000
"""Elements. A smaller bucket saves no memory to speak of, and costs a collective each."""
SMALLEST_PERSISTENT = 100_000
"""Elements; DeepSpeed's own default. A whole copy of what is smaller (norms, biases) costs less than its messages."""

OffloadDevice = Literal["none", "cpu", "nvme"]
OPTIMIZER, PARAMS = "offload_optimizer", "offload_param"
"""DeepSpeed's sections below zero_optimization; its `param` is singular."""


class ZeroOptions(Options):
    """Options of both stages; those that a stage cannot do are refused with a reason."""

    offload: Literal["none", "all"] = Field(
        "none", description="all: masters, moments and weights in host memory: offload-optimizer and offload-params cpu"
    )
    offload_optimizer: OffloadDevice | None = Field(
        None, description="where masters and moments lie and AdamW computes: none (the GPU), cpu or nvme; default: none"
    )
    offload_params: OffloadDevice | None = Field(
        None,
        description="zero-3: where weights lie while no layer needs them: none (the GPU), cpu or nvme; default: none",
    )
    nvme_path: str = Field("", description="folder on a fast disk of each node, for nvme")
    bucket_size: Annotated[int, Field(gt=0)] | None = Field(
        None, description="elements that are reduced or gathered at once; default: the square of the model's width"
    )
    prefetch_size: Annotated[int, Field(ge=0)] | None = Field(
        None, description="zero-3: elements of weights fetched ahead of use; default: nine tenths of a bucket"
    )
    config: Annotated[dict[str, Any], BeforeValidator(read_file)] = Field(
        {}, description="a DeepSpeed JSON file with further settings; what contradicts the plan is refused"
    )

    def device(self, section: str) -> str:
        """Where the optimizer or the weights are kept, as flags and file say it together."""
        return self.flagged(section) or says(self.config, f"zero_optimization.{section}.device") or "none"

    def flagged(self, section: str) -> str | None:
        """The same, as flags say it; None: they do not."""
        flag = {OPTIMIZER: self.offload_optimizer, PARAMS: self.offload_params}[section]
        return flag or ("cpu" if self.offload == "all" else None)


def deepspeed_config(options: ZeroOptions, stage: int, placement: Placement) -> dict[str, Any]:
    """What DeepSpeed is given: the plan's, and then what the user's file adds."""
    return merge_file(options.config, planned(options, stage, placement))


def planned(options: ZeroOptions, stage: int, placement: Placement) -> dict[str, Any]:
    """The DeepSpeed configuration without a file of the user's.

    The sizes are those that transformers and accelerate put for "auto": a matrix of the model's width is a bucket.
    DeepSpeed's own buckets (5e8 elements, twice over with overlap) take gigabytes of a small GPU.
    """
    on_gpu = placement.device == "cuda"
    bucket = options.bucket_size or max(SMALLEST_BUCKET, placement.hidden_size**2)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": bucket,
    }
    if stage == 3:
        prefetch = options.prefetch_size if options.prefetch_size is not None else bucket * 9 // 10
        zero["stage3_prefetch_bucket_size"] = prefetch
        zero["stage3_param_persistence_threshold"] = max(SMALLEST_PERSISTENT, 10 * placement.hidden_size)
    else:
        zero["allgather_bucket_size"] = bucket
    for section in (OPTIMIZER, PARAMS):
        if device := options.flagged(section):
            path = {"nvme_path": options.nvme_path} if device == "nvme" else {}
            # Copies to and from pinned memory run beside the GPU's computing.
            zero[section] = {"device": device, **({"pin_memory": on_gpu} if device != "none" else {}), **path}
    # Without the check ZeRO-2 applies a bf16 step whose gradient is not finite.
    precision: dict[str, Any] = {"bf16": {"enabled": placement.precision == "bf16", "check_grad_overflow": True}}
    if placement.precision == "fp16":
        precision["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return {
        "zero_optimization": zero,
        **precision,
        "train_micro_batch_size_per_gpu": placement.micro_batch,
        "gradient_accumulation_steps": placement.accumulation,
        "gradient_clipping": placement.max_grad_norm,
        "zero_allow_untested_optimizer": True,  # torch's own AdamW: exact to resume, unlike DeepSpeedCPUAdam
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def offload_problems(options: ZeroOptions, stage: int, placement: Placement) -> list[Problem]:
    """What of the offload cannot be, by the options alone."""
    optimizer, params = options.device(OPTIMIZER), options.device(PARAMS)
    found = []
    for name, said in (("offload-optimizer", options.offload_optimizer), ("offload-params", options.offload_params)):
        if options.offload == "all" and said not in (None, "cpu"):
            found.append(
                Problem(f"strategy.{name}", f"{said} contradicts --strategy.offload all (cpu): leave out one of them")
            )
    if stage == 2 and params != "none":
        all_of_it = " (all means both)" if options.offload == "all" else ""
        found.append(
            Problem(
                "strategy.offload" if all_of_it else "strategy.offload-params",
                f"zero-2 keeps all weights on each GPU, and cannot offload them{all_of_it}: use --strategy zero-3, "
                "or --strategy.offload-optimizer cpu alone",
            )
        )
    if stage == 2 and optimizer == "nvme":
        found.append(
            Problem("strategy.offload-optimizer", "DeepSpeed knows NVMe in zero-3 alone: use cpu, or --strategy zero-3")
        )
    if stage == 2 and options.prefetch_size is not None:
        found.append(Problem("strategy.prefetch-size", "zero-2 fetches no weights: leave it out, or --strategy zero-3"))
    nvme = "nvme" in (optimizer, params)
    if nvme and placement.device == "cpu":
        found.append(
            Problem(
                "strategy.offload-optimizer" if optimizer == "nvme" else "strategy.offload-params",
                "nvme frees GPU memory by asynchronous reads and writes beside the GPU, and this run has no GPU: use "
                "none or cpu",
            )
        )
    named = options.nvme_path or says(options.config, f"zero_optimization.{OPTIMIZER}.nvme_path")
    named = named or says(options.config, f"zero_optimization.{PARAMS}.nvme_path")
    if nvme and not named:
        found.append(Problem("strategy.nvme-path", "is required for nvme: a folder on a fast local disk of each node"))
    if options.nvme_path and not nvme:
        found.append(Problem("strategy.nvme-path", "nothing is offloaded to NVMe: leave it out, or choose nvme"))
    return found


def folder_problems(options: ZeroOptions) -> list[Problem]:
    """Folders for NVMe that are not there for this machine to write to."""
    found = []
    for section in (OPTIMIZER, PARAMS):
        path = options.nvme_path or says(options.config, f"zero_optimization.{section}.nvme_path")
        if path and options.device(section) == "nvme" and not (os.path.isdir(path) and os.access(path, os.W_OK)):
            reason = f"{path} is no folder that this machine can write to: make it, or give another one"
            found.append(Problem("strategy.nvme-path", reason))
    return list(dict.fromkeys(found))


def open_keys(options: ZeroOptions) -> list[str]:
    """Sizes that no flag gave, so that the file may."""
    zero = "zero_optimization"
    buckets = [] if options.bucket_size else [f"{zero}.reduce_bucket_size", f"{zero}.allgather_bucket_size"]
    return [*buckets, *([] if options.prefetch_size is not None else [f"{zero}.stage3_prefetch_bucket_size"])]
