"""What watches over optimizer steps: numbers that are not finite, and losses that jump."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from llmft_core.data.order import Rows
from llmft_core.errors import LlmftError
from llmft_core.train.aside import PutAside, batch_lines
from llmft_core.train.job import Job, Reporter
from llmft_core.train.spikes import SpikeDetector
from llmft_core.values import StepOutcome

if TYPE_CHECKING:
    from llmft_core.data.prepare import TokenTable

SETTLING = 32
"""Steps in a row that fp16's loss scaler may skip: halved so often, the largest scale that it begins with or grows to
in a run (2^24) is below 1, and it is not the scale that is wrong."""


def with_its_gradient(share: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is not finite where the loss is not, so that the strategy, which watches the gradient,
    watches both; the host need not look at it. Where it is finite it is multiplied by exactly 1."""
    return share * (1 + 0 * share.detach())


class Guards:
    """One run's, on every rank alike: all ranks see the same numbers, and decide the same."""

    def __init__(
        self, job: Job, table: TokenTable, rank: int, reporter: Reporter, put_aside: PutAside | None = None
    ) -> None:
        self.job, self.table, self.rank, self.reporter, self.put_aside = job, table, rank, reporter, put_aside
        memory = job.resume.guards if job.resume else {}
        self.skipped: int = memory.get("skipped", 0)
        self._scaling: int = memory.get("scaling", 0)  # steps in a row that the loss scaler has skipped
        self._spikes = SpikeDetector(memory.get("spikes", {}))

    @property
    def memory(self) -> dict[str, Any]:
        """JSON data for progress.json, from which a resumed run goes on."""
        return {"skipped": self.skipped, "scaling": self._scaling, "spikes": self._spikes.memory}

    def check(self, step: int, rows: Rows, loss: float, outcome: StepOutcome, shares: Sequence[torch.Tensor]) -> None:
        """After optimizer step `step` (from 0) of all ranks. `loss` is that of the step, `shares` this rank's parts of
        it by micro-batch, 0-d. Collective. Raises LlmftError where the run may not go on without this step."""
        finite = math.isfinite(loss) and math.isfinite(outcome.grad_norm)
        if outcome.applied and not finite:
            raise LlmftError(
                f"optimizer step {step + 1} was applied with loss {loss} and gradient norm {outcome.grad_norm}: the "
                "weights are ruined by the strategy, which had to refuse it: tell its author"
            )
        if outcome.applied:
            self._scaling = 0
            self._look_for_spike(step, rows, loss, shares)
        elif self.job.placement.precision == "fp16" and math.isfinite(loss) and self._scaling < SETTLING:
            self._scaling += 1
        else:
            self._refused(step, rows, loss, outcome, shares)

    def _refused(
        self, step: int, rows: Rows, loss: float, outcome: StepOutcome, shares: Sequence[torch.Tensor]
    ) -> None:
        self.skipped += 1
        allowed = self.job.plan.nonfinite_steps
        guilty, uri = self._set_aside(f"step_{step + 1:05d}_nonfinite.jsonl", rows, shares)
        what = (
            f"optimizer step {step + 1} is not applied on any rank: loss {loss}, gradient norm {outcome.grad_norm}; "
            + (f"not finite: {guilty}" if guilty else "the loss of every micro-batch is finite, the gradient is not")
            + (f"; the rows are in {uri}" if uri else "")
        )
        if self.skipped <= allowed:
            self._warn(f"{what}; {self.skipped} of {allowed} such steps that --on-nonfinite allows")
            return
        often = f"; {self.skipped} such steps are more than --on-nonfinite skip:{allowed} allows" if allowed else ""
        raise LlmftError(
            f"{what}{often}: look at these rows, lower --lr, raise --warmup-steps, use --precision fp32 or bf16, or go "
            f"on without such steps by --on-nonfinite skip:{2 * allowed or 3}"
        )

    def _look_for_spike(self, step: int, rows: Rows, loss: float, shares: Sequence[torch.Tensor]) -> None:
        if (rows.bounds[1:] == rows.bounds[:-1]).any():
            return  # the incomplete last batch of an epoch: of few rows any loss may come
        usual = self._spikes.look(loss)
        if usual is not None:
            _, uri = self._set_aside(f"step_{step + 1:05d}_spike.jsonl", rows, shares)
            self._warn(
                f"optimizer step {step + 1}: the loss jumped to {loss:.4f} from {usual:.4f}, the median of the steps "
                "before" + (f"; the rows are in {uri}, the worst first" if uri else "")
            )

    def _set_aside(self, name: str, rows: Rows, shares: Sequence[torch.Tensor]) -> tuple[str, str]:
        """(micro-batches whose loss is not finite, in words; where the rows are, or ""), on all ranks. Collective: no
        rank goes on, or down, before the rows are written."""
        mine = torch.stack(list(shares))  # (micro-batches,)
        everyone = [torch.empty_like(mine) for _ in range(self.job.placement.world_size)]
        dist.all_gather(everyone, mine)
        of_ranks = [of_rank.tolist() for of_rank in everyone]
        guilty = [
            f"micro-batch {number} of rank {rank}"
            for rank, of_rank in enumerate(of_ranks)
            for number, share in enumerate(of_rank)
            if not math.isfinite(share)
        ]
        uri = [""]
        if self.rank == 0 and self.put_aside is not None:
            uri = [self.put_aside(name, batch_lines(self.job, self.table, rows, of_ranks))]
        dist.broadcast_object_list(uri, src=0)
        more = f" and {len(guilty) - 3} more" if len(guilty) > 3 else ""
        return ", ".join(guilty[:3]) + more, uri[0]

    def _warn(self, text: str) -> None:
        if self.rank == 0:
            self.reporter.send({"kind": "warning", "text": text})
