"""`ddp`: every rank holds the whole model and optimizer; gradients are averaged. PyTorch's DDP through accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar

from llmft_core import (
    Engine,
    Fragment,
    LlmftError,
    Placement,
    Problem,
    ReadFragment,
    StepOutcome,
    Strategy,
    hookimpl,
)

if TYPE_CHECKING:
    import torch

llmft_api = 1

MOMENTS = ("exp_avg", "exp_avg_sq")  # PyTorch's names of AdamW's moments


class Ddp(Strategy):
    name: ClassVar[str] = "ddp"
    summary: ClassVar[str] = "every rank holds the whole model; gradients are averaged (no DeepSpeed)"

    def problems(self, placement: Placement) -> list[Problem]:
        if placement.device == "cpu" and placement.precision == "fp16":
            return [Problem("precision", "fp16 has no CPU kernels worth the name: use fp32 or bf16 on CPU")]
        return []

    def engine(self, placement: Placement, rank: int) -> Engine:
        return DdpEngine(placement, rank)


class DdpEngine(Engine):
    """fp32 parameters; bf16 and fp16 by autocast."""

    def __init__(self, placement: Placement, rank: int) -> None:
        from accelerate import Accelerator

        self.placement = placement
        mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[placement.precision]
        self.accelerator = Accelerator(cpu=placement.device == "cpu", mixed_precision=mixed)
        # Accelerate trains ranks apart from each other, without a word, where it misreads the environment.
        got = (self.accelerator.num_processes, self.accelerator.process_index)
        if got != (placement.world_size, rank):
            raise LlmftError(f"accelerate set up process {got[1]} of {got[0]}, not {rank} of {placement.world_size}")
        kind = self.accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise LlmftError(f"accelerate set up {kind}, not ddp: unset ACCELERATE_USE_{kind} and its kin")
        if self.accelerator.gradient_accumulation_steps != 1:  # it would divide the loss, which is a sum already
            raise LlmftError("unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS: --global-batch and --micro-batch decide it")

    @property
    def parameter_dtype(self) -> torch.dtype:
        import torch

        return torch.float32

    def building(self) -> AbstractContextManager[None]:
        return nullcontext()

    def whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(
        self,
        model: torch.nn.Module,
        make_optimizer: Callable[[Sequence[tuple[str, torch.nn.Parameter, int]]], torch.optim.Optimizer],
    ) -> None:
        from torch.nn.parallel import DistributedDataParallel

        optimizer = make_optimizer([(name, p, p.ndim) for name, p in model.named_parameters() if p.requires_grad])
        self._bare = model
        self._model, self._optimizer = self.accelerator.prepare(model, optimizer)
        if self.placement.world_size > 1 and not isinstance(self._model, DistributedDataParallel):
            raise LlmftError(f"ddp on {self.placement.world_size} ranks got a {type(self._model).__name__}")
        self._done = 0  # micro-batches of this step whose backward pass is over
        self._arm()

    @property
    def model(self) -> torch.nn.Module:
        return self._model

    @property
    def bare_model(self) -> torch.nn.Module:
        return self._bare

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        # DDP averages over ranks; the contract is a sum.
        self.accelerator.backward(loss * self.placement.world_size)
        self._done = 0 if last else self._done + 1
        self._arm()

    def _arm(self) -> None:
        """DDP decides in the forward pass whether its backward reduces: only that of the step's last micro-batch."""
        if self.placement.world_size > 1:
            self._model.require_backward_grad_sync = self._done == self.placement.accumulation - 1

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> StepOutcome:
        norm = self.accelerator.clip_grad_norm_(self._bare.parameters(), self.placement.max_grad_norm)
        grad_norm = float(norm)
        if math.isfinite(grad_norm) or self.placement.precision == "fp16":
            self._optimizer.step()  # fp16: the gradient scaler skips a step that overflowed and lowers its scale
            applied = not self._optimizer.step_was_skipped
        else:
            applied = False  # gradients are equal on all ranks, so all ranks skip
        self._optimizer.zero_grad(set_to_none=True)
        return StepOutcome(grad_norm, applied)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self._bare.named_parameters()}

    def gathered(self, names: Sequence[str], dtype: torch.dtype, rank: int = 0) -> dict[str, torch.Tensor]:
        if self.accelerator.process_index != rank:
            return {}
        parameters = dict(self._bare.named_parameters())
        return {name: parameters[name].detach().to(device="cpu", dtype=dtype, copy=True) for name in names}

    def fragments(self) -> Iterator[Fragment]:
        """Every rank holds all; each yields its share of every parameter, so that all of them write and upload."""
        world_size, rank = self.placement.world_size, self.accelerator.process_index
        for name, parameter in self._trained():
            part = -(-parameter.numel() // world_size)
            mine = slice(rank * part, (rank + 1) * part)
            for kind, values in self._kept(parameter).items():
                if len(share := values.view(-1)[mine]):
                    yield name, kind, rank * part, share

    def counters(self) -> dict[str, float]:
        steps = max((float(kept["step"]) for kept in self._adamw.state.values()), default=0.0)
        scaler = self.accelerator.scaler
        return {"optimizer_steps": steps, **({} if scaler is None else scaler_counters(scaler))}

    def restore(self, read: ReadFragment, counters: Mapping[str, float]) -> None:
        import torch

        for name, parameter in self._trained():
            if counters["optimizer_steps"]:
                fused = self._adamw.param_groups[0]["fused"]
                steps = torch.tensor(counters["optimizer_steps"], device=parameter.device if fused else "cpu")
                moments = {kind: torch.zeros_like(parameter) for kind in MOMENTS}
                self._adamw.state[parameter] = {"step": steps, **moments}
            for kind, values in self._kept(parameter).items():
                read(name, kind, 0, values.view(-1))
        if self.accelerator.scaler is not None:
            restore_scaler(self.accelerator.scaler, counters)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self._bare.named_parameters() if parameter.requires_grad]

    def _kept(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Kind → values, in the parameter's shape; the parameters themselves are fp32."""
        state = self._adamw.state.get(parameter, {})
        return {"master": parameter.data, **{kind: state[kind] for kind in MOMENTS if kind in state}}

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """Under accelerate's wrapper."""
        inner: torch.optim.Optimizer = self._optimizer.optimizer
        return inner

    def holdings(self) -> dict[str, list[torch.Tensor | None]]:
        if not hasattr(self, "_optimizer"):
            return {}
        parameters = list(self._bare.parameters())
        moments = [tensor for kept in self._adamw.state.values() for tensor in kept.values()]
        return {"weights": [*parameters], "gradients": [p.grad for p in parameters], "optimizer": moments}

    def finish(self) -> None:
        from accelerate.state import AcceleratorState

        self.accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)  # a second run in this process starts afresh


def scaler_counters(scaler: torch.amp.GradScaler) -> dict[str, float]:
    """What PyTorch's loss scaler remembers from step to step, in the contract's terms."""
    kept = scaler.state_dict()
    return {"loss_scale": float(kept["scale"]), "good_steps": float(kept["_growth_tracker"])}


def restore_scaler(scaler: torch.amp.GradScaler, counters: Mapping[str, float]) -> None:
    """The same, of whatever strategy; what is not there stays as in a new scaler."""
    now = scaler.state_dict()
    # It doubles the scale when its count EQUALS the interval: one that began beyond it would never do so.
    good_steps = min(int(counters.get("good_steps", 0)), scaler.get_growth_interval() - 1)
    loss_scale = counters.get("loss_scale", now["scale"])
    scaler.load_state_dict({**now, "scale": loss_scale, "_growth_tracker": good_steps})


@hookimpl
def llmft_strategies() -> list[type[Strategy]]:
    return [Ddp]
