"""Loss and perplexity on the test split, weighted by trained tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from llmft_core.data.batches import Form, rank_micro_batches, steps_of
from llmft_core.data.order import Order
from llmft_core.extensions import Engine
from llmft_core.train.job import Job
from llmft_core.train.loss import Call, micro_batch_loss
from llmft_core.values import Placement

if TYPE_CHECKING:
    from llmft_core.data.prepare import TokenTable


def evaluate(
    job: Job,
    engine: Engine,
    table: TokenTable,
    rank: int,
    device: torch.device,
    call: Call,
    at: Callable[[str], None],
) -> dict[str, float]:
    """`eval/loss` in nats per trained token and `eval/perplexity`, equal on all ranks; `at` is told each round before
    it. Collective."""
    micro_batch = job.plan.eval_micro_batch or job.placement.micro_batch
    layout = Placement(**{**vars(job.placement), "micro_batch": micro_batch, "accumulation": 1})
    order = Order.of(table, job.plan).epoch(0)
    rounds = 1 if job.plan.smoke_test else steps_of(len(order), layout.global_batch, drop_last=False)
    form = Form.of(job.plan, job.pad_id)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # nats, trained tokens
    engine.model.eval()
    with torch.no_grad():
        for number in range(rounds):
            at(f"round {number} of an evaluation")
            rows = order.step(number, layout.global_batch)
            for batch in rank_micro_batches(table, rows, layout, rank, form):
                totals[0] += micro_batch_loss(engine.model, batch, device, call).double()
                totals[1] += int((batch.labels[:, 1:] >= 0).sum())
    engine.model.train()
    at("the end of an evaluation")
    dist.all_reduce(totals)
    loss = float(totals[0] / totals[1])
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
