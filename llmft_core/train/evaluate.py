"""Loss and perplexity on the test split, weighted by trained tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from llmft_core.data.batches import rank_micro_batches, step_rows, steps_per_epoch
from llmft_core.extensions import Engine
from llmft_core.train.job import Job
from llmft_core.train.loss import keeps_logits, loss_sum
from llmft_core.values import Placement

if TYPE_CHECKING:
    from llmft_core.data.prepare import TokenTable


def evaluate(job: Job, engine: Engine, table: TokenTable, rank: int, device: torch.device) -> dict[str, float]:
    """`eval/loss` in nats per trained token and `eval/perplexity`, equal on all ranks. Collective."""
    micro_batch = job.plan.eval_micro_batch or job.placement.micro_batch
    layout = Placement(**{**vars(job.placement), "micro_batch": micro_batch, "accumulation": 1})
    order = np.arange(len(table))
    rounds = 1 if job.plan.smoke_test else steps_per_epoch(len(table), layout.global_batch)
    keeps = keeps_logits(engine.bare_model)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # nats, trained tokens
    engine.model.eval()
    with torch.no_grad():
        for number in range(rounds):
            rows = step_rows(order, number, layout.global_batch)
            for batch in rank_micro_batches(table, rows, layout, rank, job.pad_id):
                input_ids = torch.from_numpy(batch.input_ids).to(device)  # (B, T) int64
                labels = torch.from_numpy(batch.labels)
                totals[0] += loss_sum(engine.model, input_ids, labels, keeps=keeps).double()
                totals[1] += int((batch.labels[:, 1:] >= 0).sum())
    engine.model.train()
    dist.all_reduce(totals)
    loss = float(totals[0] / totals[1])
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
