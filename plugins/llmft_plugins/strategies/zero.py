"""`zero-2` and `zero-3`: DeepSpeed through accelerate. Stage 2 partitions gradients and optimizer, stage 3 weights too.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from llmft_core import (
    Device,
    Engine,
    FillPartition,
    Fragment,
    LlmftError,
    Placement,
    Problem,
    ReadElements,
    ReadFragment,
    StepOutcome,
    Strategy,
    hookimpl,
)
from llmft_plugins.strategies.zero_config import (
    OPTIMIZER,
    PARAMS,
    ZeroOptions,
    deepspeed_config,
    folder_problems,
    offload_problems,
    open_keys,
    planned,
)
from llmft_plugins.strategies.zero_file import file_problems
from llmft_plugins.strategies.zero_state import (
    gradients_of,
    held,
    let_go,
    make_moments,
    masters_of,
    partition_again,
    restore_scaler,
    scaler_counters,
)

if TYPE_CHECKING:
    import torch

llmft_api = 1


class Zero(Strategy):
    """What the two stages share."""

    stage: ClassVar[int]
    options_type: ClassVar[type[ZeroOptions]] = ZeroOptions
    options: ZeroOptions

    def problems(self, placement: Placement) -> list[Problem]:
        found = offload_problems(self.options, self.stage, placement)
        if placement.device == "cpu" and placement.precision == "fp16":
            found.append(Problem("precision", "fp16 is not among DeepSpeed's CPU types: use fp32 or bf16 on CPU"))
        if self.options.config:
            choose_accelerator(placement)
            mine = planned(self.options, self.stage, placement)
            found += file_problems(self.options.config, mine, placement, open_keys(self.options))
        return found

    def node_problems(self, device: Device) -> list[Problem]:
        return folder_problems(self.options) if device == "cuda" else []  # without a GPU `problems` says more

    def state_problem(self) -> str:
        where = [self.options.device(section) for section in (OPTIMIZER, PARAMS)]
        return "what DeepSpeed keeps on NVMe is not read back for states" if "nvme" in where else ""

    def configuration(self, placement: Placement) -> dict[str, Any]:
        return deepspeed_config(self.options, self.stage, placement)

    def engine(self, placement: Placement, rank: int) -> Engine:
        return ZeroEngine(self.configuration(placement), placement, rank)


class Zero2(Zero):
    name: ClassVar[str] = "zero-2"
    summary: ClassVar[str] = "DeepSpeed ZeRO-2: gradients and optimizer are partitioned over ranks"
    stage: ClassVar[int] = 2


class Zero3(Zero):
    name: ClassVar[str] = "zero-3"
    summary: ClassVar[str] = "DeepSpeed ZeRO-3: weights, gradients and optimizer are partitioned over ranks"
    stage: ClassVar[int] = 3
    partitions_weights: ClassVar[bool] = True


def choose_accelerator(placement: Placement) -> None:
    """DeepSpeed looks for a GPU when it is first imported, and stays with what it found."""
    if placement.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


class ZeroEngine(Engine):
    """One rank under DeepSpeed."""

    def __init__(self, configuration: dict[str, Any], placement: Placement, rank: int) -> None:
        self.placement, self.rank = placement, rank
        zero = configuration["zero_optimization"]
        self.stage: int = zero["stage"]
        self._offload = {section: zero.get(section, {}).get("device", "none") for section in (OPTIMIZER, PARAMS)}
        choose_accelerator(placement)
        import deepspeed
        from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

        if placement.device == "cpu":
            # DeepSpeed would compile a shared-memory operator at start: a minute, and a compiler that may not be there.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "nvme" in self._offload.values():
            check_nvme()
        handlers = [InitProcessGroupKwargs(backend="gloo")] if placement.device == "cpu" else []
        self.accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=configuration, zero3_init_flag=self.stage == 3),
            mixed_precision={"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[placement.precision],
            kwargs_handlers=handlers,
        )
        # Accelerate drops DeepSpeed or the other ranks without a word where it misreads the environment.
        got = (self.accelerator.num_processes, self.accelerator.process_index, str(self.accelerator.distributed_type))
        if got != (placement.world_size, rank, "DistributedType.DEEPSPEED"):
            raise LlmftError(
                f"accelerate set up process {got[1]} of {got[0]} as {got[2]}, "
                f"not {rank} of {placement.world_size} under DeepSpeed"
            )

    @property
    def parameter_dtype(self) -> torch.dtype:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.placement.precision]

    def building(self) -> AbstractContextManager[None]:
        # Transformers opens zero.Init itself once the plug-in above exists.
        return _without_broadcast() if self.stage == 3 else nullcontext()

    def filler(self) -> FillPartition | None:
        in_memory = self._offload[PARAMS] != "nvme"  # else a partition has left for the disk as soon as it is made
        return self._fill if self.stage == 3 and in_memory else None

    def _fill(self, parameter: torch.nn.Parameter, read: ReadElements) -> None:
        """Rank r holds the elements [r·n, (r+1)·n) of `ds_numel` in `ds_tensor` (n,); the last ones are padded."""
        part = parameter.ds_tensor.data
        start = self.rank * len(part)
        mine = max(0, min(len(part), parameter.ds_numel - start))
        if mine:
            read(start, part[:mine])
        part[mine:].zero_()  # DeepSpeed leaves there what was in the memory
        if parameter.numel() == parameter.ds_numel:  # one that is not partitioned at this time
            read(0, parameter.data.view(-1))

    def whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
        return context

    def prepare(
        self,
        model: torch.nn.Module,
        make_optimizer: Callable[[Sequence[tuple[str, torch.nn.Parameter, int]]], torch.optim.Optimizer],
    ) -> None:
        self._names = dict(model.named_parameters())
        trained = [(name, p, len(_shape(p))) for name, p in self._names.items() if p.requires_grad]
        adamw = make_optimizer(trained)
        for group in adamw.param_groups:
            group["fused"] = True  # in fp16 too: DeepSpeed scales and skips by itself
        self._model, self._optimizer = self.accelerator.prepare(model, adamw)
        stage = self._model.zero_optimization_stage()
        if stage != self.stage:
            raise LlmftError(f"DeepSpeed set up ZeRO stage {stage}, not {self.stage}")
        if self.placement.precision == "fp16":  # else an exception of DeepSpeed's ends the run before llmft's own guard
            self._zero.loss_scaler.raise_error_at_min_scale = False

    @property
    def model(self) -> torch.nn.Module:
        return self._model

    @property
    def bare_model(self) -> torch.nn.Module:
        module: torch.nn.Module = self._model.module
        return module

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        # DeepSpeed averages over ranks and micro-batches; the contract is a sum.
        self._model.set_gradient_accumulation_boundary(is_boundary=last)
        self._model.backward(loss * (self.placement.world_size * self.placement.accumulation))

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> StepOutcome:
        self._model.step()  # clips; where the norm over all ranks is not finite, it clears the gradients and no more
        norm = self._model.get_global_grad_norm()
        grad_norm = math.nan if norm is None else float(norm)
        return StepOutcome(grad_norm, bool(self._model.was_step_applied()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: _shape(p) for name, p in self.bare_model.named_parameters()}

    def gathered(self, names: Sequence[str], dtype: torch.dtype, rank: int = 0) -> dict[str, torch.Tensor]:
        import torch
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = dict(self.bare_model.named_parameters())
        found = {}
        for name in names:
            parameter = parameters[name]
            if dtype == torch.float32 and parameter.requires_grad and self.placement.precision != "fp32":
                full = safe_get_full_fp32_param(parameter)  # the master, more precise than the 16-bit copy
                if self.rank == rank:
                    found[name] = full.detach().to(device="cpu", dtype=dtype, copy=True)
                continue
            with self._readable(parameter):
                if self.rank == rank:
                    found[name] = parameter.detach().to(device="cpu", dtype=dtype, copy=True)
        return found

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._trained():
            start, kinds = held(self._zero, parameter, self.stage, self.rank, self._moments_exist())
            for kind, values in kinds.items():
                if len(values):
                    yield name, kind, start, values

    def counters(self) -> dict[str, float]:
        steps = max((float(kept.get("step", 0.0)) for kept in self._zero.optimizer.state.values()), default=0.0)
        scale = scaler_counters(self._zero.loss_scaler) if self.placement.precision == "fp16" else {}
        return {"optimizer_steps": steps, **scale}

    def restore(self, read: ReadFragment, counters: Mapping[str, float]) -> None:
        moments = bool(counters["optimizer_steps"])
        if moments:
            make_moments(self._zero, self.stage, counters["optimizer_steps"])
        for name, parameter in self._trained():
            if self.stage == 3:
                partition_again(parameter)
            start, kinds = held(self._zero, parameter, self.stage, self.rank, moments)
            for kind, values in kinds.items():
                if len(values):
                    read(name, kind, start, values)
            if self.stage == 3:  # else the model goes on with the old weights, without a word
                parameter.ds_tensor.data.view(-1)[: len(kinds["master"])].copy_(kinds["master"])
        if self.stage == 2:
            self._zero.update_lp_params()
        if self.placement.precision == "fp16":
            restore_scaler(self._zero.loss_scaler, counters)

    def _moments_exist(self) -> bool:
        return any("exp_avg" in kept for kept in self._zero.optimizer.state.values())

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.bare_model.named_parameters() if parameter.requires_grad]

    @property
    def _zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer, which holds torch's AdamW as `optimizer`."""
        return self._model.optimizer

    def _readable(self, parameter: torch.nn.Parameter) -> AbstractContextManager[None]:
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter])
        return context

    def holdings(self) -> dict[str, list[torch.Tensor | None]]:
        if not hasattr(self, "_model"):
            return {}
        parameters = list(self.bare_model.parameters())
        kept = [p.data for p in parameters] + [getattr(p, "ds_tensor", None) for p in parameters]
        masters = masters_of(self._zero, self.stage)
        moments = [tensor for state in self._zero.optimizer.state.values() for tensor in state.values()]
        gradients = [p.grad for p in parameters] + [getattr(p, "grad_accum", None) for p in parameters]
        gradients += gradients_of(self._zero, self.stage)
        return {"weights": kept, "gradients": gradients, "optimizer": [*masters, *moments]}

    def finish(self) -> None:
        from accelerate.state import AcceleratorState

        model = getattr(self, "_model", None)
        if model is not None:
            model.destroy()  # lets go of hooks and buffers before the process group ends
        self.accelerator.free_memory()
        let_go()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate's own; a ddp run after this one would obey it


def check_nvme() -> None:
    """Raises LlmftError where this machine cannot offload to NVMe, by DeepSpeed's own check, which needs the GPU."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise LlmftError(
            f"DeepSpeed's asynchronous I/O does not work on {socket.gethostname()} (no libaio, or no compiler): "
            "install libaio-dev, or use cpu for --strategy.offload-optimizer and --strategy.offload-params"
        )


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The full shape; a parameter that stage 3 has partitioned is an empty tensor that remembers it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def _without_broadcast() -> Iterator[None]:
    """Without this, zero.Init sends every new parameter from rank 0 to all: the whole model, and that before it has
    values, which are filled in afterwards (by us, or by transformers from rank 0)."""
    from deepspeed.runtime.zero.partition_parameters import Init

    def partition(self: Any, parameter: Any) -> None:
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()

    original = Init._zero_init_param
    Init._zero_init_param = partition
    try:
        yield
    finally:
        Init._zero_init_param = original


@hookimpl
def llmft_strategies() -> list[type[Strategy]]:
    return [Zero2, Zero3]
