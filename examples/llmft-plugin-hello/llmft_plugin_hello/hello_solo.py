"""A strategy: one process, plain PyTorch, fp32. The smallest `Engine` that keeps the contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

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


class HelloSolo(Strategy):
    """The driver's half: says what it cannot do, before anything is started."""

    name = "hello-solo"
    summary = "one process in plain PyTorch and fp32, as an example of a strategy"

    def problems(self, placement: Placement) -> list[Problem]:
        """One process, fp32."""
        problems = []
        if placement.world_size != 1:
            reason = f"hello-solo trains in one process, not in {placement.world_size}: use 1, or --strategy ddp"
            problems.append(Problem("workers", reason))
        if placement.precision != "fp32":
            reason = f"hello-solo computes in fp32, not in {placement.precision}: use fp32, or --strategy ddp"
            problems.append(Problem("precision", reason))
        return problems

    def engine(self, placement: Placement, rank: int) -> Engine:
        """The worker's half."""
        return SoloEngine(placement)


class SoloEngine(Engine):
    """Holds the whole model and its optimizer in this process."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._model: torch.nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Weights are loaded, trained and kept in fp32."""
        import torch

        return torch.float32

    def building(self) -> AbstractContextManager[None]:
        """Nothing special: parameters are built whole."""
        return nullcontext()

    def whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
        """They always are."""
        return nullcontext()

    def prepare(
        self,
        model: torch.nn.Module,
        make_optimizer: Callable[[Sequence[tuple[str, torch.nn.Parameter, int]]], torch.optim.Optimizer],
    ) -> None:
        """Moves the model to its device. Raises LlmftError where nothing is trained."""
        self._model = model.to(self._placement.device)  # before the optimizer, which must hold what is trained
        trained = [(name, p, p.ndim) for name, p in self._model.named_parameters() if p.requires_grad]
        if not trained:
            raise LlmftError("hello-solo: the method left no parameter to train; choose another with --method")
        self._optimizer = make_optimizer(trained)

    @property
    def model(self) -> torch.nn.Module:
        """The model itself."""
        if self._model is None:
            raise RuntimeError("hello-solo: the model is not prepared, or let go of already")
        return self._model

    @property
    def bare_model(self) -> torch.nn.Module:
        """The model itself, since nothing wraps it."""
        return self.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What `make_optimizer` made."""
        if self._optimizer is None:
            raise RuntimeError("hello-solo: the optimizer is not prepared, or let go of already")
        return self._optimizer

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Gradients add up over the micro-batches by themselves, and there is one rank."""
        loss.backward()

    def set_learning_rate(self, learning_rate: float) -> None:
        """For all groups of parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> StepOutcome:
        """Clips and applies; skips the step where a gradient is not finite."""
        import torch

        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self._placement.max_grad_norm))
        applied = math.isfinite(norm)
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(norm, applied)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the model's order; tied weights once."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def gathered(self, names: Sequence[str], dtype: torch.dtype, rank: int = 0) -> dict[str, torch.Tensor]:
        """Copies: the export writes them while training goes on."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach().to("cpu", dtype, copy=True) for name in names}

    def fragments(self) -> Iterator[Fragment]:
        """All of it: there is one rank."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                for kind, values in self._kept(parameter).items():
                    yield name, kind, 0, values.view(-1)

    def counters(self) -> dict[str, float]:
        """AdamW counts its steps itself, for each parameter alike."""
        return {"optimizer_steps": max((float(kept["step"]) for kept in self.optimizer.state.values()), default=0.0)}

    def restore(self, read: ReadFragment, counters: Mapping[str, float]) -> None:
        """AdamW makes its moments in its first step; here they are made before it, and filled."""
        import torch

        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if counters["optimizer_steps"]:
                moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(counters["optimizer_steps"]), **moments}
            for kind, values in self._kept(parameter).items():
                read(name, kind, 0, values.view(-1))

    def _kept(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Kind → values: the weights are their own masters."""
        kept = self.optimizer.state.get(parameter, {})
        return {"master": parameter.data, **{kind: kept[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in kept}}

    def finish(self) -> None:
        """Frees the model and the moments."""
        self._model = self._optimizer = None


@hookimpl
def llmft_strategies() -> list[type[Strategy]]:
    """One process."""
    return [HelloSolo]
