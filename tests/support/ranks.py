"""Plain gloo processes for tests of training: seconds, where a Ray cluster costs half a minute."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from queue import Empty
from typing import Any

TIMEOUT_SECONDS = 600


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` processes of one gloo group; the results by rank.

    Raises AssertionError with the traceback of the first rank that failed or did not end cleanly.
    """
    context = forks()
    queue = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, port, queue, function, args, dict(os.environ)))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            try:
                rank, ok, value = queue.get(timeout=TIMEOUT_SECONDS)
            except Empty:
                raise AssertionError(f"ranks {set(range(world_size)) - set(results)} gave no answer") from None
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = value
        for rank, process in enumerate(processes):
            process.join(60)
            assert process.exitcode == 0, f"rank {rank} ended with exit code {process.exitcode} after its work was done"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def forks() -> multiprocessing.context.ForkServerContext:
    """What starts ranks: each is a fork of one process that has imported what ranks import. Five seconds of a core that
    tests of commands pay, and these need not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_imports"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def inherit(environment: Mapping[str, str]) -> None:
    """A forked rank has the environment of the test that starts it, not that of the first one."""
    assert "rank_imports" in sys.modules, "the process that ranks are forked from could not import rank_imports"
    os.environ.clear()
    os.environ.update(environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def set_layout(rank: int, world_size: int, port: int) -> None:
    """What torch, accelerate and DeepSpeed read the layout from."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    queue: Any,
    function: Callable[..., Any],
    args: Any,
    environment: Mapping[str, str],
) -> None:
    inherit(environment)
    set_layout(rank, world_size, port)
    import torch
    import torch.distributed as dist

    from llmft_core.train.process_group import end_process_groups

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        value = function(rank, *args)
        dist.barrier()
        end_process_groups()
        queue.put((rank, True, value))
    except BaseException:  # noqa: BLE001 - shipped to the parent, which raises
        queue.put((rank, False, traceback.format_exc()))
        queue.close()
        queue.join_thread()
        sys.exit(1)
