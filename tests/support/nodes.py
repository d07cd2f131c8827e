"""A real Ray cluster on this machine, whose nodes come and go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import command_of


@dataclass
class Nodes:
    """A head without room for workers, and nodes with one core and a cache of their own."""

    cluster: Any
    caches: Path
    there: list[Any]

    def add(self, name: str, **variables: str) -> Any:
        """A node; its cache is its name's."""
        environment = {"LLMFT_CACHE": str(self.caches / name), **variables}
        node = self.cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", env_vars=environment)
        self.cluster.wait_for_nodes()
        self.there.append(node)
        return node

    def lose(self, node: Any) -> None:
        """As when a machine's power is cut."""
        self.there.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def ranks(self, node: Any) -> list[psutil.Process]:
        """The processes of the ranks that it has now."""
        (raylet,) = [one.process.pid for one in node.all_processes["raylet"]]
        children = psutil.Process(raylet).children(recursive=True)
        return [process for process in children if "RayTrainWorker" in command_of(process)]

    def drain_one(self) -> None:
        """The node of a rank will be gone in two minutes, as the cloud says of a spot instance: what `ray drain-node`
        does, without its seconds of imports, in which a short run would end."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        chosen = next(node for node in self.there if self.ranks(node))
        deadline = (time.time_ns() // 1_000_000) + 120_000  # milliseconds
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=self.cluster.address).drain_node(chosen.node_id, reason, "spot", deadline)
        assert accepted, why


@contextmanager
def ray_head(**settings: Any) -> Iterator[Any]:
    """A cluster that has a head alone. `settings` are Ray's own of the whole system."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # before ray is imported: it stays on loopback
    from ray.cluster_utils import Cluster

    head: dict[str, Any] = {"num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    head["_system_config"] = settings
    started = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield started
    finally:
        started.shutdown()
        monkeypatch.undo()


@contextmanager
def no_nodes_yet(cluster: Any, caches: Path) -> Iterator[Nodes]:
    """None at first, and none afterwards."""
    made = Nodes(cluster, caches, [])
    try:
        yield made
    finally:
        for node in made.there:  # each says that it goes: the head need not find out before there are others
            cluster.remove_node(node)
