"""Where DeepSpeed keeps masters and moments: the only file that knows its internals (deepspeed 0.19.8).

Nothing is gathered: `safe_get_full_*`, the public way, gives every tensor to every rank, 840 GB a rank for 70B.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from inspect import getclosurevars
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")  # PyTorch's names of AdamW's moments


def scaler_counters(scaler: Any) -> dict[str, float]:
    """What DeepSpeed's dynamic loss scaler remembers from step to step, in the contract's terms, and `hysteresis`: it
    lowers the scale at an overflow that finds it at 1, and another one takes 1 from it."""
    good = scaler.cur_iter - scaler.last_overflow_iter - 1  # since an overflow; each full window of them doubles
    good_steps = (good - 1) % scaler.scale_window + 1 if good else 0
    return {
        "loss_scale": float(scaler.cur_scale),
        "good_steps": float(good_steps),
        "hysteresis": float(scaler.cur_hysteresis),
    }


def restore_scaler(scaler: Any, counters: Mapping[str, float]) -> None:
    """The same, of whatever strategy; what is not there stays as in a new scaler."""
    scaler.cur_scale = counters.get("loss_scale", scaler.cur_scale)
    scaler.cur_iter, scaler.last_overflow_iter = int(counters.get("good_steps", 0)), -1
    scaler.cur_hysteresis = int(counters.get("hysteresis", scaler.cur_hysteresis))


def held(
    zero: Any, parameter: torch.nn.Parameter, stage: int, rank: int, moments: bool
) -> tuple[int, dict[str, torch.Tensor]]:
    """What this rank owns of a parameter: the first element, and kind → values, 1-d float32 views; empty ones where it
    owns nothing. Without `moments` the masters alone. `zero`: DeepSpeed's ZeRO optimizer."""
    kinds = MOMENTS if moments else ()
    if stage == 2:
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, {}
        # Not `get_hp_fragment(kind)`: DeepSpeed links the moments of all groups after the first group's first step,
        # when the others have none yet.
        kept = zero.optimizer.state[zero.single_partition_of_fp32_groups[mapping.param_group_index]]
        where = mapping.hp_fragment_address
        found = {kind: kept[kind].narrow(0, where.start, where.numel) for kind in kinds}
        return int(mapping.lp_fragment_address.start), {"master": mapping.get_hp_fragment(), **found}
    part: int = parameter.ds_tensor.numel()
    start = rank * part
    mine = max(0, min(part, parameter.ds_numel - start))  # the last ones are padded
    # Not `safe_get_local_*`: of an offloaded optimizer they give copies on the GPU, and a restore would be lost.
    group, first, _ = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    found = {"master": flat.narrow(0, first, part)}
    found |= {kind: zero.optimizer.state[flat][kind].narrow(0, first, part) for kind in kinds}
    return start, {kind: values.view(-1)[:mine] for kind, values in found.items()}


def masters_of(zero: Any, stage: int) -> list[torch.Tensor]:
    """This rank's masters, flat, group after group: what AdamW is given as its parameters."""
    return list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)


def gradients_of(zero: Any, stage: int) -> list[torch.Tensor | None]:
    """This rank's gradients as far as DeepSpeed has taken them from the parameters: summed so far, and as AdamW gets
    them."""
    given = [master.grad for master in masters_of(zero, stage)]
    if stage == 3:
        return [zero.grad_partitions_flat_buffer, *given]
    groups = [*zero.averaged_gradients.values(), *zero.all_grad_tensors.values()]  # lists, or None after a step
    return [*given, *(tensor for group in groups for tensor in group or ())]


def make_moments(zero: Any, stage: int, steps: float) -> None:
    """AdamW makes its moments in its first step; before a restore they must exist, for DeepSpeed's flat masters."""
    import torch

    adamw = zero.optimizer
    fused = adamw.param_groups[0]["fused"]
    for master in masters_of(zero, stage):
        counted = torch.tensor(steps, device=master.device if fused else "cpu")
        adamw.state[master] = {"step": counted, **{kind: torch.zeros_like(master) for kind in MOMENTS}}


def partition_again(parameter: torch.nn.Parameter) -> None:
    """Small parameters stay gathered between steps; the next forward pass gathers them anew, from what is restored."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        parameter.partition()


def let_go() -> None:
    """Of the model and of process groups, which DeepSpeed's modules keep after its engine is destroyed: the groups'
    threads would outlive them, and a next model in this process would find its memory taken."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups

    # These are no API. Where another version of DeepSpeed lacks one, a training that is over does not fail for it;
    # tests/core/test_exits.py finds the threads that stay then.
    with suppress(AttributeError):
        parameter_offload.FWD_MODULE_STACK.clear()
    with suppress(AttributeError, KeyError):  # an lru_cache on a method has every coordinator that there ever was
        cached = getclosurevars(PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release)
        cached.nonlocals["func"].cache_clear()
    with suppress(AttributeError):
        groups._release_process_group_references()
