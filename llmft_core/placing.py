"""A plan meets a cluster: what was left open is decided, and what does not fit is said."""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.extensions import Method, Strategy
from llmft_core.plan import ModelOptions, RunPlan, WeightsOptions
from llmft_core.plan_layers import family_of_name
from llmft_core.train.cluster import Cluster, capacity_problems
from llmft_core.train.refusals import refusals
from llmft_core.values import Device, Placement, WorkerRange, fitting_micro_batch

LARGEST_DEFAULT_MICRO_BATCH = 8
DEFAULT_LEARNING_RATE = 2e-5


def place(
    plan: RunPlan, cluster: Cluster, catalog: Catalog, usual_micro_batch: int = LARGEST_DEFAULT_MICRO_BATCH
) -> tuple[RunPlan, Placement]:
    """The plan without open fields, and the layout of its ranks. Where the plan says no micro-batch, it is the largest
    of at most `usual_micro_batch` that fits. Raises Problems."""
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
    default = cluster.gpus if device == "cuda" else min(2, cluster.cpus)
    workers = plan.workers if plan.workers is not None else default
    asked = plan.worker_range or WorkerRange(default, default)
    fewest, most = max(1, asked.fewest), max(1, asked.most)
    if device == "cuda" and cluster.address in ("", "local") and fewest > cluster.gpus:
        problems.append(Problem("workers", f"{fewest} workers need a GPU each; this machine has {cluster.gpus}"))
    precision = plan.precision or ("bf16" if device == "cuda" and cluster.bf16 else "fp32")
    strategy = plan.strategy or _default_strategy(catalog, device, most)
    problems += batch_problems(plan.global_batch, WorkerRange(fewest, most))
    share, rest = divmod(plan.global_batch, most)
    share = max(1, share)
    micro_batch = plan.micro_batch or fitting_micro_batch(share, usual_micro_batch)
    if not rest and share % micro_batch:
        problems.append(
            Problem(
                "micro-batch",
                f"{micro_batch} rows do not divide a worker's share of {share} "
                f"(--global-batch {plan.global_batch} over {most} workers): use {_divisors(share)}",
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
    largest = Placement(most, device, precision, micro_batch, max(1, share // micro_batch), plan.max_grad_norm)
    chosen: Strategy = catalog.create("strategy", strategy)
    problems += refusals(plan, chosen, largest)
    problems += capacity_problems(placed, cluster)
    if problems:
        raise Problems(problems)
    for size in range(fewest, most):  # the same said of several sizes is said once
        found = chosen.problems(largest.for_world_size(size, micro_batch))
        problems += [problem for problem in found if problem not in problems]
    if problems:
        raise Problems(problems)
    return placed, largest.for_world_size(max(fewest, min(most, room(cluster, device))), micro_batch)


def room(cluster: Cluster, device: Device) -> int:
    """So many workers the cluster can hold now. A CPU of this machine holds any number."""
    if device == "cuda":
        return cluster.gpus
    return sys.maxsize if cluster.address in ("", "local") else cluster.cpus


def batch_problems(global_batch: int, workers: WorkerRange) -> list[Problem]:
    """Numbers of workers between which an optimizer step cannot be shared evenly: all of them in one."""
    bad = [size for size in workers.sizes if global_batch % size]
    if not bad:
        return []
    if workers.fewest == workers.most:
        use = f"{_neighbours(global_batch, workers.most)}, or --workers {_divisors(global_batch)}"
        return [Problem("global-batch", f"{global_batch} rows cannot be shared by {workers.most} workers: use {use}")]
    every = math.lcm(*workers.sizes)
    use = str(-(-global_batch // every) * every)
    good = [str(size) for size in workers.sizes if size not in bad]
    use += f", or --workers {_either(good)}" if good else ""
    return [
        Problem(
            "global-batch",
            f"{global_batch} rows cannot be shared by {_either(list(map(str, bad)))} workers, and --workers {workers} "
            f"allows any number in between: use {use}",
        )
    ]


def likely_micro_batch(plan: RunPlan) -> int:
    """The micro-batch as far as the plan alone says it: for one worker where their number is open. Raises InputError
    where it does not divide the global batch."""
    workers = max(1, plan.worker_range.most if plan.worker_range else 1)
    share, rest = divmod(plan.global_batch, workers)
    micro_batch = plan.micro_batch or (fitting_micro_batch(share, LARGEST_DEFAULT_MICRO_BATCH) if share else 1)
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
    return _either([str(d) for d in range(1, number + 1) if number % d == 0])


def _either(words: list[str]) -> str:
    return ", ".join(words[:-1]) + f" or {words[-1]}" if len(words) > 1 else words[0]
