"""Packed samples must not see each other, and an architecture may let them: tried on the model itself, before training.

Restarting positions keep samples apart in transformers' attention. Recurrent and convolutional layers, and models with
a mask of their own or without positions, take no notice of them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from llmft_core.errors import LlmftError
from llmft_core.extensions import Engine
from llmft_core.train.job import Job
from llmft_core.train.joined_rows import joins_rows, lengths, takes_lengths
from llmft_core.train.loss import on_device

PROBE_TOKENS = 24
"""Tokens of each of the two samples: longer than the kernels of convolutional layers."""

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-3, "fp16": 2e-3}
"""How much of the largest logit a logit may differ where nothing but the sample before is another. Dense models do not
differ at all; where tokens are routed to experts, who else is there decides how products are cut and rounded."""

TOLERANCE_ALONE = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 1e-1}
"""The same between a packed sample and one that is alone, for which other kernels may run, layer upon layer."""


def check_isolation(job: Job, engine: Engine, device: torch.device) -> None:
    """Raises LlmftError where what lies before a sample in its row changes the sample's logits. Collective.

    The rows are as many as in training, because some kinds of attention take one row otherwise than several.
    """
    length = max(1, min(PROBE_TOKENS, job.plan.context_length // 2))
    first, other, second = ((torch.arange(1, length + 1) * step) % job.vocabulary for step in (7, 11, 13))  # (T,)
    engine.model.eval()
    with torch.no_grad():
        alone = _logits(job, engine, device, [second])
        after, after_other = (_logits(job, engine, device, [before, second])[length:] for before in (first, other))
    engine.model.train()
    differences = torch.stack([(after - after_other).abs().max(), (after - alone).abs().max()])
    shares = differences / alone.abs().max()  # (2,)
    dist.all_reduce(shares, op=dist.ReduceOp.MAX)
    precision = job.placement.precision
    limits = torch.tensor([TOLERANCE[precision], TOLERANCE_ALONE[precision]], device=shares.device)
    if (shares > limits).any():
        raise LlmftError(
            f"{type(engine.bare_model).__name__} lets packed samples see each other (what lies before a sample changes "
            f"its logits by {100 * float(shares.max()):.2g} %): use --data.packing none"
        )


def _logits(job: Job, engine: Engine, device: torch.device, samples: list[torch.Tensor]) -> torch.Tensor:
    """Logits (T, V) float32 of a row of samples, the last of several equal rows, called as in training."""
    rows = job.placement.micro_batch
    shape = (1, -1) if joins_rows(engine.bare_model) else (rows, -1)
    ids = torch.cat(samples)  # (T,)
    position_ids = torch.cat([torch.arange(len(sample)) for sample in samples])
    inputs = {"input_ids": ids, "position_ids": position_ids}
    repeated = {name: values.repeat(rows).view(shape) for name, values in inputs.items()}
    beside = lengths(repeated["position_ids"]) if takes_lengths(engine.bare_model) else {}
    logits = engine.model(**on_device({**repeated, **beside}, device), use_cache=False).logits
    return logits.flatten(0, 1)[-len(ids) :].float()
