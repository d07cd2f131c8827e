"""The machines a run has: this process, a Ray that is started here, or a cluster elsewhere."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from llmft_core.errors import InputError, LlmftError, Problem, Problems
from llmft_core.plan import RunPlan
from llmft_core.weights.share import PeerFailed

LOOPBACK = "127.0.0.1"
ANSWER_SECONDS = 5.0
"""How long a cluster may take to accept a connection."""


@dataclass(frozen=True)
class Node:
    """One machine of a cluster."""

    id: str
    host: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Cluster:
    """`address` is empty in this process, `local` for a Ray of our own, else where the cluster is."""

    address: str
    nodes: tuple[Node, ...]
    bf16: bool = True
    """Whether its GPUs compute in bf16, as far as this process can see; ranks look for themselves."""

    @property
    def working(self) -> tuple[Node, ...]:
        """The nodes that could get a worker."""
        return tuple(node for node in self.nodes if node.cpus or node.gpus)

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    @property
    def cpus(self) -> int:
        """CPU cores of all nodes, as Ray counts them."""
        return sum(node.cpus for node in self.nodes)


def survey(plan: RunPlan, *, debug: bool) -> Cluster:
    """What there is to train on. Connects to a cluster elsewhere, but starts nothing here.

    Raises InputError if the cluster does not answer.
    """
    address = _address(plan)
    if address in ("", "local"):
        import torch

        gpus = torch.cuda.device_count() if plan.gpus_per_worker != 0 else 0
        bf16 = not gpus or torch.cuda.is_bf16_supported(including_emulation=False)
        return Cluster(address, (Node("", socket.gethostname(), len(os.sched_getaffinity(0)), gpus),), bf16)
    return _connected(address, debug)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C within takes effect at the end: Ray's start-up, broken off, leaves processes and locks behind."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, _: got.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if got:
        raise KeyboardInterrupt


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """What SIGTERM does stays what it is: Ray's own handler ends the process with another exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _address(plan: RunPlan) -> str:
    if plan.workers == 0:
        return ""
    if plan.cluster == "auto":
        return os.environ.get("RAY_ADDRESS") or "local"
    return plan.cluster


@contextmanager
def own_ray(plan: RunPlan, *, debug: bool) -> Iterator[None]:
    """Where a run needs a Ray of its own: start it before anything else is known, and meanwhile import what the driver
    goes on with, for Ray's start is mostly waiting and imports are work. At the end leave whatever cluster there is; a
    Ray of our own ends with all its processes."""
    try:
        if _address(plan) == "local":
            importing = threading.Thread(target=_import_libraries, name="llmft-imports", daemon=True)
            importing.start()
            # Ray in this thread: its processes end with the thread that started them.
            workers = plan.worker_range.most if plan.worker_range else 2
            _start_ray(max(len(os.sched_getaffinity(0)), workers), 0 if plan.gpus_per_worker == 0 else None, debug)
            importing.join()
        yield
    finally:
        if _address(plan) and "ray" in sys.modules:
            import ray

            ray.shutdown()


def _import_libraries() -> None:
    with suppress(Exception):  # an import that fails fails again where it is needed, and is told there
        import torch  # noqa: F401
        from transformers import AutoTokenizer, LlamaConfig  # noqa: F401 - what a tokenizer is loaded with


def start(cluster: Cluster, workers: int, *, debug: bool) -> Cluster:
    """The cluster as it is now, with room for so many workers: `own_ray` began before their number was known, and is
    started again where it turns out to be too small."""
    if cluster.address != "local":
        return cluster
    # One core a worker, also where there are fewer: a laptop trains slowly rather than waits for ever.
    cpus = max(cluster.cpus, workers)
    begun = Cluster("local", nodes_now())
    if begun.cpus >= cpus and begun.gpus == cluster.gpus:
        return begun
    import ray

    ray.shutdown()
    _start_ray(cpus, cluster.gpus, debug)
    return Cluster("local", nodes_now())


def _start_ray(cpus: int, gpus: int | None, debug: bool) -> None:
    """On this machine. `gpus`: None has Ray count them."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # the default adds seconds to a short run
    # Processes for tasks, of which there are none: workers are actors with an environment of their own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Loopback only: a Ray of our own has no reason to listen on the network. Without the variable, ray.init hangs.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    with interrupts_held_back(), sigterm_kept():
        import ray

        ray.init(
            address="local",
            _node_ip_address=LOOPBACK,
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            **_logging(debug),
        )


def _connected(address: str, debug: bool) -> Cluster:
    import ray

    where = f"cluster: {address} does not answer"
    hint = "is the head node up, and is the address HOST:6379 or ray://HOST:10001? --cluster local starts Ray here"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        with sigterm_kept():
            ray.init(address=address, **_logging(debug))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{where} ({' '.join(str(error).split())[:200]}): {hint}") from None
    return Cluster(address, nodes_now())


def _logging(debug: bool) -> dict[str, Any]:
    import ray

    # Ray repeats what the raylet says of a dead worker on the driver whatever `log_to_driver` says; ours is one line.
    ray._private.worker._worker_logs_enabled = debug
    return {
        "log_to_driver": debug,
        "logging_level": logging.INFO if debug else logging.ERROR,
        "configure_logging": True,
        "ignore_reinit_error": True,
    }


def nodes_now() -> tuple[Node, ...]:
    """The nodes of the cluster that are alive; none once this process has left it."""
    import ray

    if not ray.is_initialized():
        return ()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return tuple(
        Node(
            node["NodeID"],
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
        )
        for node in alive
    )


def without(cluster: Cluster, leaving: Sequence[str]) -> Cluster:
    """What is there now of a cluster elsewhere, without the nodes of these ids."""
    return Cluster(cluster.address, tuple(node for node in nodes_now() if node.id not in leaving))


def on_each_node(cluster: Cluster, function: Callable[..., Any], *args: Any) -> dict[Node, Any]:
    """Run a function once on every node that could get a worker, in parallel; its result by node.

    Raises the function's own LlmftError, with the host's name, or one that says what is missing there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0)(function)
    return collected(
        {
            node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*args)
            for node in cluster.working
        }
    )


def collected(refs: Mapping[Node, Any]) -> dict[Node, Any]:
    """The results of what runs on nodes. Raises LlmftError with the host's name, once all have ended; of several the
    first one that no other node's failure explains."""
    import ray

    results: dict[Node, Any] = {}
    failed: list[LlmftError] = []
    for node, ref in refs.items():  # all of them, also after one that failed: what the others fetch is kept for later
        try:
            results[node] = ray.get(ref)
        except ray.exceptions.RayError as error:
            failed.append(_failure(node, error))
    if failed:
        raise min(failed, key=lambda error: isinstance(error, PeerFailed))
    return results


def _failure(node: Node, error: Exception) -> LlmftError:
    """A node's error, with the node's name."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, Problems):
            return Problems([Problem(f"node {node.host}", str(problem)) for problem in cause.problems])
        if isinstance(cause, LlmftError):
            kind = type(cause) if isinstance(cause, PeerFailed) else LlmftError
            return (InputError if isinstance(cause, InputError) else kind)(f"node {node.host}: {cause}")
        return LlmftError(f"node {node.host}: {last_line(str(error))}: is the same llmft installed there?")
    return LlmftError(
        f"node {node.host}: it was lost ({last_line(str(error))}): is it still up? Start again: what the other nodes "
        "have fetched is kept"
    )


def last_line(text: str) -> str:
    """Where a remote traceback says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def capacity_problems(plan: RunPlan, cluster: Cluster) -> list[Problem]:
    """A cluster that can never hold the workers would let a run wait for ever."""
    if cluster.address in ("", "local"):
        return []
    wanted = plan.worker_range.fewest if plan.worker_range else 0
    there, unit = (cluster.gpus, "GPUs") if plan.gpus_per_worker else (cluster.cpus, "cores")
    if wanted <= there:
        return []
    return [Problem("workers", f"{wanted} workers need {wanted} {unit}; the cluster at {cluster.address} has {there}")]
