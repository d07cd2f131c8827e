"""How large a run's things are, before there are any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmft_core.plan import RunPlan
from llmft_core.train.cluster import Cluster
from llmft_core.train.method import Share
from llmft_core.values import ModelSize, Placement

BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}


def written_type(plan: RunPlan) -> str:
    """The type in which weights are written; fp32 while the precision is open."""
    return plan.checkpoint.dtype if plan.checkpoint.dtype != "auto" else plan.precision or "fp32"


def checkpoint_bytes(plan: RunPlan, size: ModelSize, share: Share) -> int:
    """Bytes of the weights of one checkpoint: of the model, or of an adapter, which is written in fp32."""
    if share.adapter:
        return share.trained * BYTES_OF["fp32"]
    return size.parameters * BYTES_OF[written_type(plan)]


def staged_bytes(plan: RunPlan, size: ModelSize, share: Share, cluster: Cluster, placement: Placement) -> int:
    """Bytes that may lie in the cache of one node while they are uploaded: two checkpoints, and what its ranks hold of
    a state (master weights and two moments, in fp32)."""
    state = 3 * BYTES_OF["fp32"] * share.trained if plan.state.every_steps or plan.state.every_minutes else 0
    together = max(node.gpus if placement.device == "cuda" else node.cpus for node in cluster.nodes)
    here = min(placement.world_size, max(1, together))  # ranks of one node, at most
    return 2 * checkpoint_bytes(plan, size, share) + state * here // placement.world_size


def hidden_size(config: Mapping[str, Any]) -> int:
    """Width of a model's hidden states by its config.json, of text where it knows other things too; 0: it does not
    say."""
    text = config.get("text_config") or config
    return int(next((text[name] for name in ("hidden_size", "n_embd", "d_model") if text.get(name)), 0))
