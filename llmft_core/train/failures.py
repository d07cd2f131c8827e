"""Why a run on Ray failed, in one line: the rank and the host that failed first, not those that failed with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmft_core.errors import LlmftError
from llmft_core.report import words
from llmft_core.train.cluster import last_line
from llmft_core.train.hanging import hanging
from llmft_core.train.job import Job
from llmft_core.train.mailbox import OnEvent
from llmft_core.train.stopping import Stop


class Watch:
    """Takes the events of a run on their way to the driver, and remembers what is needed to explain its end."""

    def __init__(self, on_event: OnEvent, job: Job, stop: Stop, nodes: Mapping[str, str] | None = None) -> None:
        """`nodes`: node id → host."""
        self._pass_on, self._total_steps, self._stop, self._nodes = on_event, job.total_steps, stop, nodes or {}
        self._step = job.resume.step if job.resume else 0
        self._leaving: list[str] = []  # ids of nodes that are taken away
        self._errors: list[dict[str, Any]] = []
        self._hung: list[dict[str, Any]] = []
        self._hosts: dict[int, str] = {}
        self._complete: list[str] = []  # URIs of checkpoints
        self._state = job.resume.state if job.resume else ""  # URI of the newest one

    def handle(self, event: dict[str, Any]) -> None:
        """One event of a rank."""
        if event["kind"] == "error":
            self._errors.append(event)
        elif event["kind"] == "rank":
            self._hosts[event["rank"]] = event["host"]
        elif event["kind"] == "preempted":
            self._leaving = event["nodes"]
            seconds = event["seconds"]
            when = f" in {words.duration(seconds)}" if seconds is not None else ""
            self._pass_on({"kind": "warning", "text": f"{self.taken()}{when}: saving a state after this step"})
        elif event["kind"] == "failed":
            self._stop.training = False
            who = ", ".join(map(self._named, event["ranks"]))
            what = self.hanging() or f"{who} failed or was lost"
            self._pass_on({"kind": "warning", "text": f"{what}; {self.kept()}"})
        elif event["kind"] == "hung":
            self._hung.append(event)
            self._pass_on(event)
        elif event["kind"] == "restarted":
            self._errors.clear()  # of ranks that are gone
            self._hung.clear()
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
        return f"node {', '.join(self._nodes.get(node, node) for node in self._leaving)} is being taken away"

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
        import ray

        failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
        causes = {rank: getattr(one, "health_check_failure", one) for rank, one in failures.items()}
        dead = sorted(rank for rank, one in causes.items() if isinstance(one, ray.exceptions.RayActorError))
        first = min(self._errors, key=lambda event: not event["ours"], default=None)
        if first is not None and first["ours"]:
            return f"{self._named(first['rank'])}: {first['message']}; {self.kept()}"
        if self._hung:
            return f"{self.hanging()}; {self.kept()}"
        if dead:
            who = ", ".join(map(self._named, dead))
            return (
                f"{who}: the process was killed or its machine is gone. Most often memory "
                "ran out: look into that machine's kernel log (dmesg), then lower --micro-batch or --context-length, "
                f"or use more --workers; {self.kept()}"
            )
        if first is not None:
            return f"{self._named(first['rank'])}: {first['message']}; {self.kept()}; --debug shows all"
        said = next(iter(failures.values()), error)
        return f"training failed: {last_line(str(said))}; {self.kept()}; --debug shows all"

    def _named(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}" if rank in self._hosts else f"rank {rank}"
