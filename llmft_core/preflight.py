"""All that can be known to fail is checked before anything is rented, and reported together."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sysconfig
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.loading import load_plugins
from llmft_core.plan import SINGLE_KINDS, RunPlan
from llmft_core.storage.check_storage import probe
from llmft_core.storage.lease import NAME as LEASE
from llmft_core.storage.lease import refuse_if_held
from llmft_core.storage.places import Place, Places
from llmft_core.storage.transfer import delete, list_files, write_bytes
from llmft_core.train.cluster import Cluster, Node, on_each_node
from llmft_core.values import Device
from llmft_core.weights.cache import cache_folder
from llmft_core.weights.stage import comes_from_place


def storage_problems(plan: RunPlan, places: Places, *, new: bool = True) -> list[Problem]:
    """Whether the run's storage takes, returns and deletes an object, and whether a new run's name is free."""
    try:
        runs = places.runs()
        probe(runs)
        if new and plan.name:
            return name_problems(runs / plan.name)
    except InputError as error:
        return [Problem("storage", str(error))]
    return []


def name_problems(run: Place) -> list[Problem]:
    """Whether a new run may take this folder. A lease that nobody holds is left of a process that was killed before it
    had begun its run, and none of a run."""
    if [name for name in list_files(run) if name != LEASE]:
        return [Problem("name", f"{run.uri} exists already: choose another --name, or remove that run")]
    try:
        refuse_if_held(run)
    except InputError as error:
        return [Problem("", str(error))]
    return []


def context_problems(plan: RunPlan, config: Mapping[str, Any]) -> list[Problem]:
    """A context longer than the model's positions would train on positions it has never seen."""
    longest = config.get("text_config", config).get("max_position_embeddings")
    if isinstance(longest, int) and plan.context_length > longest:
        return [
            Problem(
                "context-length", f"{plan.context_length} tokens; {plan.model.name} has {longest} positions: use fewer"
            )
        ]
    return []


def sharing_problems(plan: RunPlan, cluster: Cluster, catalog: Catalog) -> list[Problem]:
    """Nodes can only split what lies in a mirror or at a URI."""
    if not plan.weights.share or len(cluster.working) < 2 or comes_from_place(plan, catalog):
        return []
    return [
        Problem(
            "weights.share",
            f"model {plan.model.name} comes from no mirror or URI, so nodes cannot split it: give --weights.mirror URI "
            "or --model URI, or leave out --weights.share",
        )
    ]


def tracker_problems(plan: RunPlan, catalog: Catalog) -> list[Problem]:
    """What would keep a tracker from watching the run: better known now than after an hour without a curve."""
    return [problem for choice in plan.tracker for problem in catalog.create("tracker", choice).problems()]


def machine_problems(plan: RunPlan, catalog: Catalog) -> list[Problem]:
    """What this machine lacks for a plan without open fields."""
    device: Device = "cuda" if plan.gpus_per_worker else "cpu"
    return [
        problem for kind in SINGLE_KINDS for problem in catalog.create(kind, getattr(plan, kind)).node_problems(device)
    ]


def disk_problems(staged_bytes: int) -> list[Problem]:
    """Whether this machine's cache has room for what is staged there at once."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free >= staged_bytes:
        return []
    return [
        Problem(
            "LLMFT_CACHE",
            f"{folder} has {free / 1e9:.1f} GB free; staging checkpoints and states needs {staged_bytes / 1e9:.1f} GB: "
            "set LLMFT_CACHE to a larger disk",
        )
    ]


def compiler_problems(device: Device) -> list[Problem]:
    """What this machine lacks of what torch.compile builds kernels with, which it does where they run."""
    lacking: dict[str, str] = {}  # what → how to get it
    on_gpu = device == "cuda"
    if on_gpu and importlib.util.find_spec("triton") is None:
        lacking["triton cannot be imported"] = "pip install triton"
    wanted = [os.environ.get("CC", ""), "gcc", "clang"] if on_gpu else [os.environ.get("CXX", "g++")]
    if not any(shutil.which(compiler) for compiler in wanted):
        lacking["no C compiler is in PATH" if on_gpu else f"{wanted[0]} is not in PATH"] = "apt-get install g++"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        lacking["Python.h is not there"] = "apt-get install python3-dev"
    return [
        Problem("compile", f"{what}, with which torch.compile builds kernels: {mend}, or leave out --compile")
        for what, mend in lacking.items()
    ]


def node_problems(plan_json: Mapping[str, Any], seen: str, staged_bytes: int) -> list[str]:
    """Runs on a node: what of the plan its own plugins cannot do, what it lacks for them or to compile, whether it sees
    a file (`seen`, or nothing), and whether its cache has room for a checkpoint: any node may get rank 0."""
    plan = RunPlan.from_json(plan_json)
    catalog = Catalog(load_plugins(plan.disable_plugin))
    problems = []
    for kind in SINGLE_KINDS:
        try:
            catalog.create(kind, getattr(plan, kind))
        except Problems as error:
            problems += [str(problem) for problem in error.problems]
        except InputError as error:
            problems.append(str(error))
    if not problems:
        problems += map(str, machine_problems(plan, catalog))
    problems += [str(problem) for problem in disk_problems(staged_bytes)]
    if plan.compile:
        problems += map(str, compiler_problems("cuda" if plan.gpus_per_worker else "cpu"))
    if seen and not Path(seen).exists():
        problems.append(
            f"storage.root: {Path(seen).parent} is not the driver's folder: "
            "use a folder that all nodes mount, or --storage s3 or gcs"
        )
    return problems


def cluster_problems(plan: RunPlan, places: Places, cluster: Cluster, staged_bytes: int) -> list[Problem]:
    """Ask every node, by its host name: are the plan's plugins, what these need, and the room for a checkpoint there,
    and is a local storage root really shared?

    Called once the cluster is up and before a worker starts. Of this machine alone everything is known already.
    """
    if cluster.address in ("", "local"):
        return []
    runs = places.runs()
    flag: Place | None = None
    if not runs.backend.shared_by_nodes():  # even one node may be another machine
        flag = runs / f".llmft-shared-{socket.gethostname()}-{uuid.uuid4().hex}"
        write_bytes(flag, b"written by the driver to see whether all nodes share this folder\n")
    try:
        found: dict[Node, list[str]] = on_each_node(
            cluster, node_problems, plan.to_json(), flag.path if flag is not None else "", staged_bytes
        )
    finally:
        if flag is not None:
            delete(flag)
    return [Problem(f"node {node.host}", text) for node, texts in found.items() for text in texts]
