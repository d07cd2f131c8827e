"""A plan meets a cluster: what was left open is decided, and what does not fit is said."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.extensions import Method, Strategy
from llmft_core.plan import ModelOptions, RunPlan, WeightsOptions
from llmft_core.plan_layers import family_of_name
from llmft_core.train.cluster import Cluster, capacity_problems
from llmft_core.values import Device, Placement

LARGEST_DEFAULT_MICRO_BATCH = 8
DEFAULT_LEARNING_RATE = 2e-5


def place(plan: RunPlan, cluster: Cluster, catalog: Catalog) -> tuple[RunPlan, Placement]:
    """The plan without open fields, and the layout of its ranks. Raises Problems."""
    problems: list[Problem] = []
    gpus_per_worker = plan.gpus_per_worker if plan.gpus_per_worker is not None else int(cluster.gpus > 0)
    if gpus_per_worker and not cluster.gpus:
        problems.append(
            Problem("gpus-per-worker", "there is no GPU here: use --gpus-per-worker 0, or another --cluster")
        )
    device: Device = "cuda" if gpus_per_worker and cluster.gpus else "cpu"
    if plan.workers == 0 and plan.cluster not in ("auto", "local"):
        problems.append(
            Problem("cluster", f"--workers 0 trains in this process, not at {plan.cluster}: leave out one of the two")
        )
    workers = plan.workers if plan.workers is not None else (cluster.gpus if device == "cuda" else min(2, cluster.cpus))
    world_size = max(1, workers)
    if device == "cuda" and cluster.address in ("", "local") and world_size > cluster.gpus:
        problems.append(Problem("workers", f"{world_size} workers need a GPU each; this machine has {cluster.gpus}"))
    precision = plan.precision or ("bf16" if device == "cuda" and cluster.bf16 else "fp32")
    strategy = plan.strategy or _default_strategy(catalog, device, world_size)
    share, rest = divmod(plan.global_batch, world_size)
    if rest:
        problems.append(
            Problem(
                "global-batch",
                f"{plan.global_batch} rows cannot be shared by {world_size} workers: use "
                f"{_neighbours(plan.global_batch, world_size)}, or --workers {_divisors(plan.global_batch)}",
            )
        )
        share = max(1, share)
    micro_batch = plan.micro_batch or default_micro_batch(share)
    if not rest and share % micro_batch:
        problems.append(
            Problem(
                "micro-batch",
                f"{micro_batch} rows do not divide a worker's share of {share} "
                f"(--global-batch {plan.global_batch} over {world_size} workers): use {_divisors(share)}",
            )
        )
    family = family_of_name(plan.model.name, catalog)
    method: Method = catalog.create("method", plan.method)
    usual = family.learning_rate(plan.model.name) if family else DEFAULT_LEARNING_RATE
    rate = plan.lr or usual * method.learning_rate_factor
    placed = plan.model_copy(
        update={
            "name": plan.name or default_name(plan),
            "model": plan.model if family else absolute_folder(plan.model),
            "weights": absolute_mirror(plan.weights),
            "workers": workers,
            "gpus_per_worker": int(device == "cuda"),
            "precision": precision,
            "strategy": strategy,
            "micro_batch": micro_batch,
            "eval_micro_batch": plan.eval_micro_batch or micro_batch,
            "epochs": plan.epochs or (None if plan.max_steps else 1),
            "lr": rate,
        }
    )
    accumulation = max(1, share // micro_batch)
    placement = Placement(world_size, device, precision, micro_batch, accumulation, plan.max_grad_norm)
    chosen: Strategy = catalog.create("strategy", strategy)
    problems += chosen.problems(placement)
    if (reason := chosen.state_problem()) and (plan.state.every_steps or plan.state.every_minutes):
        problems.append(Problem("state", f"{reason}: --state.every-minutes 0 writes none, for a run that cannot go on"))
    problems += capacity_problems(placed, cluster)
    if problems:
        raise Problems(problems)
    return placed, placement


def default_micro_batch(share: int) -> int:
    """Rows of a forward pass where the plan does not say: the largest of at most 8 that divides a worker's share."""
    return max(d for d in range(1, LARGEST_DEFAULT_MICRO_BATCH + 1) if share % d == 0)


def likely_micro_batch(plan: RunPlan) -> int:
    """The micro-batch as far as the plan alone says it: for one worker where their number is open. Raises InputError
    where it does not divide the global batch."""
    workers = max(1, plan.workers or 1)
    share, rest = divmod(plan.global_batch, workers)
    micro_batch = plan.micro_batch or (default_micro_batch(share) if share else 1)
    if rest or share % micro_batch:
        count = "1 worker" if workers == 1 else f"{workers} workers"
        raise InputError(
            f"--global-batch {plan.global_batch} cannot be shared by {count} in micro-batches of {micro_batch}: "
            "choose another --global-batch or --micro-batch"
        )
    return micro_batch


def _default_strategy(catalog: Catalog, device: Device, world_size: int) -> dict[str, Any]:
    name = "zero-3" if device == "cuda" and world_size > 1 else "ddp"
    options = catalog.create("strategy", {"name": name}).options
    return {"name": name, **options.model_dump(mode="json", by_alias=True)}


def absolute_folder(model: ModelOptions) -> ModelOptions:
    """A model that is a local folder by its absolute path: workers start in folders of their own. Else as it is."""
    folder = Path(model.name).expanduser()
    return model.model_copy(update={"name": str(folder.absolute())}) if folder.is_dir() else model


def absolute_mirror(weights: WeightsOptions) -> WeightsOptions:
    """A mirror that is a local folder by its absolute path, as `absolute_folder`."""
    if not weights.mirror or "://" in weights.mirror:
        return weights
    return weights.model_copy(update={"mirror": str(Path(weights.mirror).expanduser().absolute())})


def default_name(plan: RunPlan) -> str:
    """`gsm8k-llama-2-7b-20260131-181500`: a folder name that sorts by time within an experiment."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.model.name.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"
    return f"{plan.dataset['name']}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"[:100]


def _neighbours(batch: int, world_size: int) -> str:
    below = batch // world_size * world_size
    return f"{below} or {below + world_size}" if below else str(world_size)


def _divisors(number: int) -> str:
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return ", ".join(found[:-1]) + f" or {found[-1]}" if len(found) > 1 else found[0]
