"""Packed samples must not see each other, and an architecture may let them: tried on the model itself, before training.

Restarting positions keep samples apart in transformers' attention. Recurrent and convolutional layers, and models with
a mask of their own, take no notice of them.
"""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist

from llmft_core.errors import LlmftError
from llmft_core.extensions import Engine
from llmft_core.train.job import Job
from llmft_core.train.loss import Call

PROBE_TOKENS = 24
"""Tokens of each of the two samples: longer than the kernels of convolutional layers."""

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest difference of a logit, as a share of the largest logit, that rounding in other orders may make."""


def check_isolation(job: Job, engine: Engine, device: torch.device) -> None:
    """Raises LlmftError where what lies before a sample in its row changes the sample's logits. Collective.

    The rows are as many as in training, because some kinds of attention take one row otherwise than several.
    """
    parameters = inspect.signature(engine.bare_model.forward).parameters
    if "position_ids" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise LlmftError(
            f"{type(engine.bare_model).__name__} takes no positions, so packed samples would see each other: "
            "use --data.packing none"
        )
    rows, vocabulary = job.placement.micro_batch, job.vocabulary
    length = max(1, min(PROBE_TOKENS, job.plan.context_length // 2))
    counted = torch.arange(length)
    first, other, second = ((counted * step + step) % vocabulary for step in (7, 11, 13))  # (T,)
    engine.model.eval()
    with torch.no_grad():
        alone = _logits(engine, second, counted, rows, device)  # (T, V)
        after = [
            _logits(engine, torch.cat([before, second]), torch.cat([counted, counted]), rows, device)[-length:]
            for before in (first, other)
        ]
    engine.model.train()
    differences = torch.stack([(after[0] - after[1]).abs().max(), (after[0] - alone).abs().max()])
    worst = (differences.max() / alone.abs().max()).reshape(1)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if float(worst) > TOLERANCE[job.placement.precision]:
        raise LlmftError(
            f"{type(engine.bare_model).__name__} lets packed samples see each other (what lies before a sample changes "
            f"its logits by {100 * float(worst):.2g} %): use --data.packing none"
        )


def _logits(
    engine: Engine, ids: torch.Tensor, positions: torch.Tensor, rows: int, device: torch.device
) -> torch.Tensor:
    """Logits (T, V) float32 of the last of several equal rows `ids` (T,), called as in training."""
    shape = (1, -1) if Call.of(engine.bare_model).flat else (rows, -1)
    inputs = {"input_ids": ids.repeat(rows).view(shape), "position_ids": positions.repeat(rows).view(shape)}
    logits = engine.model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits
    return logits.flatten(0, 1)[-len(ids) :].float()
