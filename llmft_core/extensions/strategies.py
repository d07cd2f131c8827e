"""How training is spread over ranks: the strategy on the driver, and its engine on each worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from llmft_core.errors import Problem
from llmft_core.extensions.base import Extension
from llmft_core.values import Placement, StepOutcome

if TYPE_CHECKING:
    import torch


class Strategy(Extension, ABC):
    """How training is spread over ranks: pure data on the driver, an `Engine` on each worker."""

    partitions_weights: ClassVar[bool] = False
    """Whether a rank of its engine holds only a part of each weight."""

    def problems(self, placement: Placement) -> list[Problem]:
        """What this strategy cannot do with such a placement, found before anything is started."""
        return []

    def state_problem(self) -> str:
        """Why states cannot be taken of what it trains (some of it lies where its engine cannot read it), or nothing:
        a plan that writes states is refused then."""
        return ""

    def configuration(self, placement: Placement) -> dict[str, Any]:
        """What it will do, as plain data for the plan (the DeepSpeed configuration), or {}."""
        return {}

    @abstractmethod
    def engine(self, placement: Placement, rank: int) -> Engine:
        """The worker's half. The default process group exists already."""


ReadElements = Callable[[int, "torch.Tensor"], None]
"""`read(start, into)` fills `into` (1-d, any type and device) with the elements [start, start + len(into)) of one
parameter's values, flattened in row-major order, converted to the type of `into`."""

FillPartition = Callable[["torch.nn.Parameter", ReadElements], None]
"""`fill(parameter, read)` writes this rank's part of a parameter, and of its values reads only these."""


Fragment = tuple[str, str, int, "torch.Tensor"]
"""(parameter's name, kind, start, values): the elements [start, start + len(values)) of what the optimizer keeps of one
parameter, flattened in row-major order. Kinds are `master` (the fp32 weights), `exp_avg` and `exp_avg_sq` (AdamW's
moments). `values` is 1-d float32, on any device, and goes on changing with training."""

ReadFragment = Callable[[str, str, int, "torch.Tensor"], None]
"""`read(name, kind, start, into)` fills `into` (1-d float32, any device) with the elements from `start` on."""


class Engine(ABC):
    """One rank's hold on the model under one strategy. The loop and the export know only this."""

    @property
    @abstractmethod
    def parameter_dtype(self) -> torch.dtype:
        """Type in which the model's parameters are loaded; masters and autocast are the engine's own affair."""

    @abstractmethod
    def building(self) -> AbstractContextManager[None]:
        """The context in which the model is built (ZeRO-3 partitions parameters as they are made)."""

    def filler(self) -> FillPartition | None:
        """None: a model made under `building` is whole on every rank, and transformers loads it. An engine under which
        transformers makes parameters partitioned from the start returns what fills them between `building` and
        `prepare`: each rank then reads its own part from its node's files. Filling is not collective; together the
        ranks read every element at least once, and padding is no element."""
        return None

    @abstractmethod
    def whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
        """Before `prepare`: a context in which these parameters are whole and may be written. All ranks write the
        same; where parameters are partitioned, what rank 0 wrote is kept."""

    @abstractmethod
    def prepare(
        self,
        model: torch.nn.Module,
        make_optimizer: Callable[[Sequence[tuple[str, torch.nn.Parameter, int]]], torch.optim.Optimizer],
    ) -> None:
        """Take the model over. `make_optimizer` gets (name, parameter, true number of dimensions) of all that is
        trained; a partitioned parameter does not know its own dimensions. Raises LlmftError if what was set up is
        not what the strategy promised."""

    @property
    @abstractmethod
    def model(self) -> torch.nn.Module:
        """What the loop calls for a forward pass."""

    @property
    @abstractmethod
    def bare_model(self) -> torch.nn.Module:
        """The model without the strategy's wrapper: its names, config and buffers."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """`loss` is this micro-batch's share (0-d) of the step's loss: the gradient of the step is that of the SUM of
        all shares over micro-batches and ranks. `last` closes the step. Clipping belongs to the engine."""

    @abstractmethod
    def set_learning_rate(self, learning_rate: float) -> None:
        """For the coming step; called before its last backward."""

    @abstractmethod
    def step(self) -> StepOutcome:
        """Apply the step after its last backward, on all ranks or on none, and clear the gradients.

        It is not applied on any rank where the gradient is not finite, be it on one rank only (in fp16, where the loss
        scaler says so): masters, moments, weights and AdamW's count of steps stay what they were, bit for bit. A loss
        that is not finite has no finite gradient: the core sees to that before `backward`."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter by name, in the model's own order, on every rank alike; tied ones once."""

    @abstractmethod
    def gathered(self, names: Sequence[str], dtype: torch.dtype, rank: int = 0) -> dict[str, torch.Tensor]:
        """Full copies of these parameters in host memory, on this one rank ({} on the others). Collective: all ranks
        call it with the same arguments. Cast to `dtype` from the most precise copy there is."""

    @abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds of the optimizer's state, after a step: together the ranks yield every element of every
        trained parameter exactly once. Before the first step that was applied there are masters alone. Not collective:
        nothing is gathered."""

    @abstractmethod
    def counters(self) -> dict[str, float]:
        """What else the next step depends on, equal on all ranks: `optimizer_steps` (those that were applied), and in
        fp16 `loss_scale` and `good_steps` (in a row, since the loss scale last changed). What one scaler alone counts
        comes on top."""

    @abstractmethod
    def restore(self, read: ReadFragment, counters: Mapping[str, float]) -> None:
        """After `prepare`, before the first step: take masters, moments and counters from a state, whatever strategy
        and world size wrote it, reading no more than this rank holds. The weights that the model computes with follow
        the masters. Of the counters only `optimizer_steps` is always there: a state of a run in another precision has
        no loss scale, and one of another strategy not what this scaler alone counts; they begin as in a new run. All
        ranks call it."""

    def holdings(self) -> dict[str, list[torch.Tensor | None]]:
        """What this rank keeps between forward passes, wherever it lies: `weights`, `gradients`, `optimizer` (masters
        and moments); {} before `prepare`. It explains an out-of-memory error: it allocates nothing, and is not
        collective."""
        return {}

    @abstractmethod
    def finish(self) -> None:
        """Let go of everything; called once, also after an error where that is possible."""
