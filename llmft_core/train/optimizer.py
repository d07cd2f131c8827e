"""AdamW over what is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llmft_core.errors import LlmftError
from llmft_core.plan import RunPlan


def optimizer_maker(
    plan: RunPlan,
) -> Callable[[Sequence[tuple[str, torch.nn.Parameter, int]]], torch.optim.Optimizer]:
    """A function from (name, parameter, true dimensions) to AdamW; matrices decay, norms and biases do not.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; betas and epsilon are PyTorch's.
    """

    def make(trained: Sequence[tuple[str, torch.nn.Parameter, int]]) -> torch.optim.Optimizer:
        if not trained:
            raise LlmftError(f"method {plan.method['name']} trains no parameter at all")
        decayed = [parameter for _, parameter, dimensions in trained if dimensions >= 2]
        others = [parameter for _, parameter, dimensions in trained if dimensions < 2]
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # Not fused in fp16: a fused step hides from accelerate that the gradient scaler skipped it.
        # On CPU, and where the optimizer is offloaded, fused is one pass over memory instead of a dozen.
        fused = plan.precision != "fp16"
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=plan.lr or 0.0, fused=fused)

    return make
