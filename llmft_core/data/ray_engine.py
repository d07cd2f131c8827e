"""Encoding on all nodes of a Ray cluster: a task a block, the answers in the order of the blocks."""

from __future__ import annotations

import hashlib
import pickle
from collections import deque
from collections.abc import Iterator
from typing import Any

from llmft_core.data.blocks import Block
from llmft_core.data.encode_blocks import BlockEncoder, EncodedBlock, Failure, Work, checked, span
from llmft_core.data.workers import SINGLE_THREADED, FileName
from llmft_core.errors import InputError, LlmftError


class RayEngine:
    """Encodes blocks on the cluster that this process is connected to.

    Why tasks and not Ray Data: see docs/decisions/0013-token-cache.md."""

    def __init__(self, work: Work) -> None:
        """Raises InputError where this process is connected to no cluster."""
        import ray

        if not ray.is_initialized():
            raise InputError(
                "--data.engine ray encodes on the nodes of a cluster, and this run has none: give --cluster ADDRESS, "
                "or leave it out: local uses all cores of this machine"
            )
        pickled = pickle.dumps(work)
        self._work = ray.put((hashlib.sha256(pickled).hexdigest(), pickled))
        self._at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # blocks
        # An environment of its own keeps these processes apart from those that train later.
        self._task = ray.remote(
            num_cpus=1, scheduling_strategy="SPREAD", max_retries=3, runtime_env={"env_vars": SINGLE_THREADED}
        )(encode_on_node)

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        del self._work

    def encode(self, blocks: Iterator[Block], file_name: FileName) -> Iterator[EncodedBlock]:
        """As `LocalEngine.encode`. At most two blocks a core of the cluster are on their way, in the driver and in the
        object stores together. A block whose node is lost is encoded by another one."""
        tasks: deque[tuple[Block, str, Any]] = deque()
        try:
            for block in blocks:
                file = file_name(block.file)
                tasks.append((block, file, self._task.remote(self._work, block, file)))
                if len(tasks) == self._at_once:
                    yield _answer(*tasks.popleft())
            while tasks:
                yield _answer(*tasks.popleft())
        finally:
            _cancel([ref for _, _, ref in tasks])


def _answer(block: Block, file: str, ref: Any) -> EncodedBlock:
    import ray

    try:
        answer = ray.get(ref)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[-1] if lines else type(error).__name__
        raise LlmftError(
            f"{span(block, file)}: the Ray task that encoded these rows failed ({why}): are the same llmft and "
            "plugins installed on every node? --data.engine local encodes on this machine"
        ) from error
    return checked(answer)


def _cancel(refs: list[Any]) -> None:
    import ray

    for ref in refs:
        ray.cancel(ref)


_made: dict[str, BlockEncoder] = {}
"""The encoder of this worker process by its work: Ray keeps a process for further tasks of the same kind."""


def encode_on_node(work: tuple[str, bytes], block: Block, file: str) -> EncodedBlock | Failure:
    """Runs on a node."""
    key, pickled = work
    if key not in _made:
        _made.clear()
        _made[key] = BlockEncoder(pickle.loads(pickled))
    return _made[key].answer(block, file)
