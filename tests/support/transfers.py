"""What tests of transfers to each store have in common."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from typing import Any

from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.storage.engine import Budget

CATALOG = Catalog(load_plugins())
KIB, MIB = 2**10, 2**20
SMALL = Budget(concurrency=4, chunk=MIB)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def in_process(code: str, storage: Mapping[str, Any], *arguments: str) -> subprocess.Popen[str]:
    """Runs code in a fresh process, with `place`, `transfer`, `Budget`, `MIB` and `arguments` at hand. `storage`: a
    plan's; the place is `file` among its runs."""
    start = f"""
        import resource, sys, os
        from pathlib import Path
        from llmft_core.catalog import Catalog
        from llmft_core.loading import load_plugins
        from llmft_core.storage import transfer
        from llmft_core.storage.engine import Budget
        from llmft_core.storage.places import Places
        MIB = 2**20
        arguments = sys.argv[1:]
        place = Places(Catalog(load_plugins()), {dict(storage)!r}, {{}}).runs() / "file"
    """
    program = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)


def kill_once(process: subprocess.Popen[str], is_so: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Kills the process in the moment in which that is so. Fails where it ends before, or takes longer; it is gone in
    any case."""
    until = time.monotonic() + seconds
    try:
        while not is_so():
            assert process.poll() is None, f"ended with exit code {process.returncode} before {what}"
            assert time.monotonic() < until, f"no {what} within {seconds} s"
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL, f"ended with exit code {process.returncode}, at {what}"
