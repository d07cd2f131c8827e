"""What tests of transfers to each store have in common."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from llmft_core.storage.engine import Budget

KIB, MIB = 2**10, 2**20
SMALL = Budget(concurrency=4, chunk=MIB)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
