"""The learning rate: a pure function of the plan and the optimizer step, never saved, never drifting."""

from __future__ import annotations

import math

from llmft_core.plan import RunPlan


def learning_rate(plan: RunPlan, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `total_steps`.

    Rises linearly to the peak over `warmup-steps`, the first step already above zero; then linear or cosine towards
    zero, which the step after the last one would reach, or constant.
    """
    peak = plan.lr
    if peak is None:
        raise ValueError("the plan is not resolved: it has no learning rate")
    if step < plan.warmup_steps:
        return peak * (step + 1) / plan.warmup_steps
    if plan.schedule == "constant":
        return peak
    progress = (step - plan.warmup_steps) / max(1, total_steps - plan.warmup_steps)
    if plan.schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
