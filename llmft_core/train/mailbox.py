"""How ranks speak to the driver under Ray: an actor holds events until the driver takes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

OnEvent = Callable[[dict[str, Any]], None]

POLL_SECONDS = 0.2


class Mailbox:
    """An actor that holds events until the driver takes them."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.given_up = False
        self.stopping = False
        self.begun: set[int] = set()  # ranks
        self.answers: dict[str, str] = {}

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.given_up = self.given_up or (event.get("kind") == "error" and event["ours"])

    def is_given_up(self) -> bool:
        """Whether ranks that are started now are to end at once: the run is being stopped, or a rank has said what is
        wrong in llmft's own words, and would end alike."""
        return self.given_up or self.stopping

    def stop(self) -> None:
        """The driver asks for a state, and for the end."""
        self.stopping = True

    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self.stopping

    def begins_again(self, rank: int) -> bool:
        """Whether this rank has begun before: the launcher has started the ranks again. Asked once by each."""
        again = rank in self.begun
        self.begun.add(rank)
        return again

    def answer(self, node: str, text: str) -> None:
        """The driver has sent the data to a node that joined; or why it could not."""
        self.answers[node] = text

    def answer_to(self, node: str) -> str | None:
        """What the driver answered to that node; None: nothing yet."""
        return self.answers.get(node)

    def take(self) -> list[dict[str, Any]]:
        taken, self.events = self.events, []
        return taken


def open_mailbox() -> Any:
    """A mailbox on the driver's own node: it must not go with a node that is lost."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()


class MailboxReporter:
    """A rank's end of the mailbox: sending does not wait, leaving does."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self.last: Any = None

    def send(self, event: dict[str, Any]) -> None:
        self.last = self.mailbox.put.remote(event)

    def flush(self) -> None:
        """Wait until the last event has arrived (calls of one caller arrive in order)."""
        import ray

        if self.last is not None:
            ray.get(self.last)


class MailReader(threading.Thread):
    """Takes events out of the mailbox while `fit()` holds the main thread (Ray handles Ctrl-C only there)."""

    def __init__(self, mailbox: Any, handle: OnEvent, idle: Callable[[], None] = lambda: None) -> None:
        """`idle` is called after each look into the mailbox."""
        super().__init__(name="llmft-mail", daemon=True)
        self.mailbox, self.handle, self.idle = mailbox, handle, idle
        self.done = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        import ray

        try:
            while not self.done.wait(POLL_SECONDS):
                for event in ray.get(self.mailbox.take.remote()):
                    self.handle(event)
                self.idle()
        except BaseException as error:  # noqa: BLE001 - raised again by finish(), in the main thread
            self.failure = error

    def finish(self) -> None:
        """Stop, and handle what is left. May be called twice."""
        import ray

        if self.done.is_set():
            return
        self.done.set()
        self.join()
        if self.failure is not None and not isinstance(self.failure, ray.exceptions.RayError):
            raise self.failure
        if self.failure is None and ray.is_initialized():  # else Ray has gone, and fit() says why
            for event in ray.get(self.mailbox.take.remote(), timeout=30):
                self.handle(event)
