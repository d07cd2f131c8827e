"""What tests of transfers to each store have in common."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import pytest
from fault_proxy import Fault

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


def passing_faults(of: Callable[[bytes], bool]) -> pytest.MarkDecorator:
    """A test for each `fault` of answers to such requests that a download has to outlive."""
    faults = {
        "reset": Fault(of, 3, reset_after=1000),
        "truncated": Fault(of, 3, truncate_after=70_000),
        "503": Fault(of, 3, status_503=True),
        "hang": Fault(of, 1, hang=True),
    }
    return pytest.mark.parametrize("fault", faults.values(), ids=faults)
