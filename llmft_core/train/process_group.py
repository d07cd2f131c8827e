"""The end of the process groups, with their threads, while Python still runs.

A thread of gloo lets go of a finished collective's tensors a moment after the rank has gone on. Where Python is being
taken down by then it cannot get Python's lock, and the process, whose work is done, aborts: "terminate called without
an active exception" (PyTorch issue 190489). So no thread may outlive the group; but the threads end with the last
reference to the group only, and `destroy_process_group` is content with forgetting its own.
"""

from __future__ import annotations

import gc
import sys
import traceback
from types import FunctionType

import torch.distributed as dist


def end_process_groups() -> None:
    """Destroy the default process group and all others. In the end of a `try` it also ends what the exception holds:
    engines have references to groups. Not collective, but it waits for collectives that were begun."""
    error = sys.exception()
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    forget_as_default()
    dist.destroy_process_group()
    gc.collect()  # models and their hooks are circles


def forget_as_default() -> None:
    """`def all_reduce(tensor, group=group.WORLD)`: a module that was imported while the group existed has it for ever.
    torch.distributed.nn, torch.distributed.optim and deepspeed.comm are written so; None means the same to them."""
    world = dist.group.WORLD
    for one in gc.get_objects():
        if type(one) is FunctionType and any(default is world for default in one.__defaults__ or ()):
            one.__defaults__ = tuple(None if default is world else default for default in one.__defaults__ or ())
