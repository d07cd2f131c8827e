"""A node that joined the cluster after the run was prepared gets what the others have, before its first rank trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmft_core.errors import LlmftError, one_line
from llmft_core.train.cluster import Cluster, nodes_now
from llmft_core.train.ship import ship

ASK_SECONDS = 0.5
"""Between two questions whether the driver has sent the data."""

ANSWER_SECONDS = 3600.0
"""How long the data may be on its way; after that the driver does not listen any more."""

Prepare = Callable[[], dict[str, str]]
"""Runs on the node that joined, in a rank's process: checks it, and fetches the weights; returns its folders."""


@dataclass(frozen=True)
class Joining:
    """What a run has for such nodes. `keys`: the folders of the driver's cache that it needs, by their place in it."""

    prepare: Prepare
    keys: Sequence[str]

    def folders(self, node: str, mailbox: Any) -> Mapping[str, str]:
        """This node's copies. Called by each of its ranks: the data comes once, the weights under the node's lock.
        Raises LlmftError."""
        import ray

        mailbox.put.remote({"kind": "joined", "node": node})
        deadline = time.monotonic() + ANSWER_SECONDS
        while (answer := ray.get(mailbox.answer_to.remote(node))) is None:
            if time.monotonic() > deadline:
                raise LlmftError(
                    f"the driver did not send the prepared data within {ANSWER_SECONDS:.0f} s: is it still running? "
                    "Stop it, and `llmft resume` the run"
                )
            time.sleep(ASK_SECONDS)
        if answer:
            raise LlmftError(answer)
        return self.prepare()

    def send(self, node: str, cluster: Cluster) -> str:
        """The driver's side: the data onto that node, if it is not there. What went wrong, or nothing."""
        try:
            ship(replace(cluster, nodes=tuple(one for one in nodes_now() if one.id == node)), self.keys)
        except LlmftError as error:
            return one_line(error)
        return ""
