"""Why a run on Ray failed, in one line: the rank and the host that failed first, not those that failed with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmft_core.errors import LlmftError
from llmft_core.report import words
from llmft_core.train.cluster import Node, last_line
from llmft_core.train.hanging import hanging
from llmft_core.train.job import Job
from llmft_core.train.mailbox import OnEvent
from llmft_core.train.stopping import Stop
from llmft_core.values import WorkerRange

NodesNow = Callable[[], Sequence[Node]]

PATIENCE = 30.0
"""Seconds after a failure until it is said what the run waits for; then ten times as long."""

NODE_LOST = "its node was lost"
KILLED = "the process was killed or its machine is gone"
LESS_MEMORY = "lower --micro-batch or --context-length, add --gradient-checkpointing, or use more --workers"
OUT_OF_MEMORY = f"Ray's memory monitor killed the process: its machine was out of memory: {LESS_MEMORY}"


def how_it_died(error: BaseException) -> str:
    """Why a rank's process is gone, from what Ray Train says; nothing where it is a Python error."""
    import ray

    cause = getattr(error, "health_check_failure", error)
    text = str(cause)
    if isinstance(cause, ray.exceptions.OutOfMemoryError) or "running low on memory" in text:
        return OUT_OF_MEMORY
    if isinstance(cause, ray.exceptions.NodeDiedError) or "node has died" in text:
        return NODE_LOST
    return KILLED if isinstance(cause, ray.exceptions.RayActorError) else ""


class Watch:
    """Takes the events of a run on their way to the driver, and remembers what is needed to explain its end."""

    def __init__(
        self,
        on_event: OnEvent,
        job: Job,
        stop: Stop,
        nodes: Mapping[str, str] | None = None,
        nodes_now: NodesNow = tuple,
    ) -> None:
        """`nodes`: node id → host, as the run began. `nodes_now`: the nodes of the cluster that are alive; none where
        it does not say."""
        self._pass_on, self._stop, self._nodes_now = on_event, stop, nodes_now
        self._job, self._total_steps, self._hosts_of_nodes = job, job.total_steps, nodes or {}
        size, self._device = job.placement.world_size, job.placement.device
        self._workers = job.plan.worker_range or WorkerRange(size, size)
        self._step = job.resume.step if job.resume else 0
        self._leaving: list[str] = []  # ids of nodes that are taken away
        self._errors: list[dict[str, Any]] = []
        self._hung: list[dict[str, Any]] = []
        self._hosts: dict[int, str] = {}
        self._nodes: dict[int, str] = {}  # rank → node id
        self._size = 0  # world size of the ranks that there are, or were last
        self._failed_at: float | None = None  # seconds, while the ranks are gone
        self._patience = PATIENCE
        self._unexplained: set[int] = set()  # ranks that died perhaps, with their nodes: Ray needs about 15 s to know
        self._complete: list[str] = []  # URIs of checkpoints
        self._state = job.resume.state if job.resume else ""  # URI of the newest one

    def handle(self, event: dict[str, Any]) -> None:
        """One event of a rank."""
        if event["kind"] == "error":
            self._errors.append(event)
        elif event["kind"] == "rank":
            self._begins(event)
        elif event["kind"] == "preempted":
            self._leaving = event["nodes"]
            seconds = event["seconds"]
            when = f" in {words.duration(seconds)}" if seconds is not None else ""
            self._pass_on({"kind": "warning", "text": f"{self.taken()}{when}: {self._stop.ending}"})
        elif event["kind"] == "failed":
            self._stop.training = False
            self._failed_at, self._patience = time.monotonic(), PATIENCE
            deaths = self._with_lost_nodes(event["deaths"])
            # A rank that lives hears of a lost one at once, and may be the first to be told of: any other may be gone.
            self._unexplained = {rank for rank in self._nodes if deaths.get(rank, "") in ("", KILLED)}
            what = self.hanging() or self._who(deaths)
            self._pass_on({"kind": "warning", "text": f"{what}; {self.kept()}"})
        elif event["kind"] == "hung":
            self._hung.append(event)
            self._pass_on(event)
        elif event["kind"] == "restarted":
            self._leaving, self._step = [], event["step"]
            self._pass_on(event)
        else:
            if event["kind"] == "checkpoint":
                self._complete.append(event["uri"])
            elif event["kind"] == "state":
                self._state = event["uri"]
            elif event["kind"] == "metrics":
                self._stop.training = True
                self._step = event["step"]
            self._pass_on(event)

    @property
    def unfinished(self) -> bool:
        """Whether steps are left."""
        return self._step < self._total_steps

    @property
    def leaving(self) -> list[str]:
        """Ids of the nodes for whose sake the ranks have ended, with a state."""
        return self._leaving if self.unfinished else []

    def stopped(self) -> str:
        """After which step, and what there is to go on from."""
        return f" after optimizer step {self._step} of {self._total_steps}: {self.kept()}"

    def announce(self, text: str) -> None:
        """That a state was asked for."""
        self._pass_on({"kind": "stopping", "text": text})

    def taken(self) -> str:
        """Which nodes are taken away."""
        return f"node {', '.join(self._hosts_of_nodes.get(node, node) for node in self._leaving)} is being taken away"

    def _begins(self, event: dict[str, Any]) -> None:
        if self._failed_at is not None or event["rank"] in self._hosts:  # those before are gone
            self._look_for_lost_nodes()
            self._unexplained.clear()
            self._errors.clear()
            self._hung.clear()
            self._hosts.clear()
            self._nodes.clear()
            self._failed_at = None
        self._hosts[event["rank"]], self._nodes[event["rank"]] = event["host"], event["node"]
        before, self._size = self._size or self._workers.most, event["world_size"]
        if self._size != before:
            self._pass_on(
                {
                    "kind": "warning",
                    "text": f"{words.counted(self._size, 'worker')} of --workers {self._workers} now, instead of "
                    f"{before}: the same global batch and order of rows, but sums are rounded in another order, so the "
                    f"weights will not be the same to the last bit{self._other_numbers(before)}",
                }
            )

    def _other_numbers(self, before: int) -> str:
        """What another number of workers, `before` until now, does to dropout."""
        if not self._job.dropout:
            return ""
        was, now = (self._job.for_world_size(size).placement.micro_batch for size in (before, self._size))
        if was == now:
            return ""
        return f"; micro-batches have {now} rows instead of {was}: dropout draws other numbers from here on"

    def _look_for_lost_nodes(self) -> None:
        """Say of a rank that died that its node did, once Ray knows."""
        if not self._unexplained:
            return
        deaths = self._with_lost_nodes(dict.fromkeys(sorted(self._unexplained), KILLED))
        for rank, death in deaths.items():
            if death == NODE_LOST:
                self._unexplained.discard(rank)
                self._pass_on({"kind": "warning", "text": f"{self._named(rank)}: {NODE_LOST}"})

    def _with_lost_nodes(self, deaths: Mapping[int, str]) -> dict[int, str]:
        """How ranks died, where Ray knows by now that the node of some is gone."""
        alive = {node.id for node in self._nodes_now()}
        gone = {rank for rank, node in self._nodes.items() if alive and node not in alive}
        return {rank: NODE_LOST if rank in gone else death for rank, death in deaths.items()}

    def look(self) -> None:
        """Say what became of lost ranks, and what the run waits for, where its ranks have been gone for long."""
        self._look_for_lost_nodes()
        if self._failed_at is None or time.monotonic() - self._failed_at < self._patience:
            return
        self._patience *= 10
        fewest = self._workers.fewest
        nodes = self._nodes_now()
        gpus = self._device == "cuda"
        there, unit = (sum(node.gpus for node in nodes), "GPU") if gpus else (sum(node.cpus for node in nodes), "CPU")
        if there < fewest:
            run = self._state.rpartition("/")[0] or "RUN"
            text = (
                f"waiting for room for {words.counted(fewest, 'worker')} ({fewest} {unit}s; the cluster has "
                f"{there} now): add a node, or stop, and `llmft resume {run} --workers {max(1, there)}`"
            )
            self._pass_on({"kind": "warning", "text": text})

    def raise_given_up(self) -> None:
        """Raises LlmftError where the ranks were started again after an error of ours, and ended at once."""
        ours = next((event for event in self._errors if event["ours"]), None)
        if ours is not None:
            raise LlmftError(f"{self._named(ours['rank'])}: {ours['message']}; {self.kept()}")

    def hanging(self) -> str:
        """Which ranks hung, in one line; empty where none reported it."""
        return hanging(self._hung, self._hosts, self._named)

    def kept(self) -> str:
        """What there is to go on from."""
        if self._state:
            run, _, name = self._state.rpartition("/")
            return f"`llmft resume {run}` goes on from {name}"
        last = self._complete[-1:]
        return f"the last complete checkpoint is {last[0]}" if last else "no checkpoint was complete yet"

    def explained(self, error: BaseException) -> str:
        """`error` is what Ray Train's `fit` raised. When one rank dies, the others fail in their next collective, and
        their errors say nothing: so first comes what llmft itself said, then who died, then the first error."""
        failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
        deaths = self._with_lost_nodes({rank: how_it_died(one) for rank, one in sorted(failures.items())})
        first = min(self._errors, key=lambda event: not event["ours"], default=None)
        if self._hung and not (first is not None and first["ours"]):
            return f"{self.hanging()}; {self.kept()}"
        if any(deaths.values()) and not (first is not None and first["ours"]):
            advice = ""
            if KILLED in deaths.values():
                advice = f". Most often memory ran out: look into that machine's kernel log (dmesg), then {LESS_MEMORY}"
            return f"{self._who(deaths)}{advice}; {self.kept()}"
        if first is not None:
            hint = "" if first["ours"] else "; --debug shows all"
            return f"{self._named(first['rank'])}: {first['message']}; {self.kept()}{hint}"
        said = next(iter(failures.values()), getattr(error, "controller_failure", error))
        if died := how_it_died(said):
            return f"a worker ended while it was being started: {died}; {self.kept()}"
        return f"training failed: {last_line(str(said))}; {self.kept()}; --debug shows all"

    def _who(self, deaths: Mapping[int, str]) -> str:
        """The ranks whose processes died, and how; if none did, the first error."""
        how: dict[str, list[str]] = {}
        for rank, death in deaths.items():
            if death:
                how.setdefault(death, []).append(self._named(rank))
        if how:
            return ", ".join(f"{', '.join(ranks)}: {death}" for death, ranks in how.items())
        first = next(iter(self._errors), None)
        if first is not None:
            return f"{self._named(first['rank'])}: {first['message']}"
        return f"{', '.join(map(self._named, deaths))} failed"

    def _named(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}" if rank in self._hosts else f"rank {rank}"
