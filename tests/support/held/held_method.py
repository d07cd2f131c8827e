"""A plugin of the tests' own: full fine-tuning that stands still in a forward pass for as long as a test wants.

Processes find it through PYTHONPATH, as if it were installed; what it waits for is in the environment: see `hold.py`.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core import Method, Setting, hookimpl
from llmft_plugins.methods.full import Full

if TYPE_CHECKING:
    import torch

llmft_api = 1
LIMIT = 1500  # seconds; as long as the longest test may take


class Held(Full):
    """`full`, with a place to stand still at."""

    name = "held"
    summary = "full, which waits for a test"

    def apply(self, model: torch.nn.Module, setting: Setting) -> torch.nn.Module:
        """All of it trained."""
        import torch

        wanted, go = int(os.environ["HELD_IN_PASS"]), Path(os.environ["HELD_UNTIL"])
        passes = iter(range(10**9))

        def stand_still(module: torch.nn.Module, *_: Any) -> None:
            # Probes before training, and evaluations, compute no gradients. (--compile would: it is not used here.)
            if not (module.training and torch.is_grad_enabled()) or next(passes) != wanted or go.exists():
                return
            go.with_suffix(".held").touch()  # Ray shows no output of ranks
            deadline = time.monotonic() + LIMIT
            while not go.exists() or (os.environ.get("HELD_UNTIL_TOLD") and is_looking_out()):
                if time.monotonic() > deadline:  # the test is gone, and nobody would end this process
                    raise TimeoutError(f"no test lets this rank go on: {go}")
                time.sleep(0.01)

        model.register_forward_pre_hook(stand_still)
        return super().apply(model, setting)


def is_looking_out() -> bool:
    """Whether this is rank 0 under Ray, and does not know yet that it is to stop: its `Lookout` looks until it does."""
    return any(thread.name == "llmft-lookout" for thread in threading.enumerate())


@hookimpl
def llmft_methods() -> list[type[Method]]:
    """That one."""
    return [Held]
