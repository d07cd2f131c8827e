"""The methods that ship: what they train."""

from __future__ import annotations

from llmft_core import Options
from llmft_plugins.methods.full import Full


def test_full_trains_everything_also_what_arrives_frozen() -> None:
    from torch import nn

    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).requires_grad_(False)
    trained = Full(Options()).apply(model)
    assert trained is model
    assert all(parameter.requires_grad for parameter in model.parameters())
