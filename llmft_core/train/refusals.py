"""What a strategy cannot do with a plan: asked before a run, and before a flag is recommended."""

from __future__ import annotations

from llmft_core.errors import Problem
from llmft_core.extensions import Strategy
from llmft_core.plan import RunPlan
from llmft_core.values import Placement


def refusals(plan: RunPlan, strategy: Strategy, placement: Placement) -> list[Problem]:
    """All of it, for the plan's strategy."""
    found = list(strategy.problems(placement))
    if (reason := strategy.state_problem()) and (plan.state.every_steps or plan.state.every_minutes):
        found.append(Problem("state", f"{reason}: --state.every-minutes 0 writes none, for a run that cannot go on"))
    if plan.compile and strategy.partitions_weights:
        reason = f"{strategy.name} gathers weights within each block, where a compiled block does not wait for them"
        found.append(Problem("compile", f"{reason}: use --strategy ddp or zero-2, or leave out --compile"))
    return found
