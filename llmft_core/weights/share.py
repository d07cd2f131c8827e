"""Nodes that split a model's bytes and take the rest from each other, through Ray's object store.

Every node stages as it always does: the same transfer, hashes, journal, lock and cache. Only where a chunk comes from
differs: each has one node that brings it from the source, and the others ask that node for it. A node answers out of
the file that it is writing, so nothing is kept in memory for those that are slower, and a node that has a file in its
cache already answers at once.

It cannot come to a standstill: all nodes fetch in the same order, so the first chunk that is missing anywhere is being
brought by its node, and what is before it is there for everyone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from llmft_core.errors import LlmftError
from llmft_core.storage.engine import STANDARD_BUDGET
from llmft_core.weights.cache import cache_folder, read_cache_manifest

CHUNK = STANDARD_BUDGET.chunk  # bytes; the transfer's own grid
STORE_BYTES = 2**30  # of one node's object store that others' requests may take, all together
MOMENT = 2.0  # seconds that a node waits for a chunk to come before it says "not yet"
ANSWER = 60.0  # seconds after which a node that says nothing is asked again; Ray tells when it is lost

Copy = tuple[str, dict[str, str]]
"""The folder of the cache that a node has used, and the SHA-256 of each file in it."""


class PeerFailed(LlmftError):
    """Another node could not give what was asked of it: its own error says more."""


@dataclass
class _Held:
    """One file of this node, as far as it has come."""

    handle: int
    version: str | None
    """The source's; None where the cache had the file: then the folder's key stands for it."""
    there: int  # bytes from the beginning on
    starts: set[int] = field(default_factory=set)  # chunks behind them

    def has(self, start: int, length: int) -> bool:
        return start + length <= self.there or start in self.starts


class Sharer:
    """One node's end: a Ray actor, in whose process the node stages. It is the transfer's `Exchange`."""

    def __init__(self, number: int, hosts: Sequence[str]) -> None:
        """`hosts`: the names of all nodes, for messages; this one is `hosts[number]`."""
        self._number, self._hosts = number, hosts
        self._peers: Sequence[Any] = ()
        self._key = ""  # name of the folder in the cache: it stands for the source and its content
        self._root = Path()
        self._first: dict[str, int] = {}  # file → number of its first chunk, of those of all files
        self._held: dict[str, _Held] = {}
        self._ended = ""  # why nothing more comes
        self._failed = False
        self._news = threading.Condition()
        self._asking = threading.Semaphore(requests_at_once(len(hosts)))

    # --- for the driver

    def hold(self) -> None:
        """Waits until no other run shares, and keeps others waiting until this process ends. Asked of one node alone.

        Else two runs could hold each other up for ever: each has the lock of the folder on one node, and waits there
        for the node where the other one has it."""
        from filelock import FileLock

        folder = cache_folder() / "mirror"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "share.lock", thread_local=False)
        self._lock.acquire()

    def stage(self, peers: Sequence[Any], function: Callable[..., Any], *args: Any) -> tuple[Any, Copy]:
        """Runs `function(*args, self)`, which stages the model on this node; its result, and what is here now.
        `peers`: the actors of all nodes in their order."""
        self._peers = peers
        try:
            result = function(*args, self)
            files = read_cache_manifest(cache_folder() / "mirror" / self._key)["files"]
        except BaseException as error:
            self._end(f"stopped: {error}", failed=True)
            raise
        self._end("has another content of the source: somebody writes there", failed=False)
        return result, (self._key, {name: noted["sha256"] for name, noted in files.items()})

    # --- for the other nodes

    def read(self, key: str, name: str, version: str, start: int, length: int) -> Any:
        """Bytes of a file as an array; None where they have not come yet; or in words why they never will."""
        import numpy as np  # arrays go through the object store without being copied once more

        until = monotonic() + MOMENT
        with self._news:
            while True:
                held = self._held.get(name) if key == self._key else None
                if self._failed:
                    return self._ended
                if held is not None and held.version not in (None, version):
                    return "has another version of it: the source was changed meanwhile"
                if held is not None and held.has(start, length):
                    break
                if self._ended:
                    return self._ended
                if not self._news.wait(until - monotonic()):
                    return None
        data = np.empty(length, dtype=np.uint8)
        read = 0
        while read < length:
            more = os.preadv(held.handle, [data[read:].data], start + read)
            if more == 0:
                return f"has lost the end of {name}: somebody cut it"
            read += more
        return data

    # --- for this node's own staging

    def begin(self, folder: Path, root: Path, sizes: Mapping[str, int], missing: Sequence[str]) -> None:
        """This model's files are wanted: they become `folder`, and lie below `root` now, all but those missing."""
        with self._news:
            self._key, self._root = folder.name, root
            self._first = first_chunks(sizes)
            for name in sizes.keys() - set(missing):
                handle = os.open(root / name, os.O_RDONLY | os.O_CLOEXEC)
                self._held[name] = _Held(handle, None, sizes[name])
            self._news.notify_all()

    def opened(self, target: Path, version: str, handle: int, there: int) -> None:
        """As `Exchange` says."""
        with self._news:  # the copy of the handle outlives the transfer, and the renaming at its end
            self._held[self._name(target)] = _Held(os.dup(handle), version, there)
            self._news.notify_all()

    def is_brought(self, target: Path, start: int) -> bool:
        """As `Exchange` says."""
        return self._bringer(target, start) != self._number

    def arrived(self, target: Path, start: int) -> None:
        """As `Exchange` says."""
        with self._news:
            self._held[self._name(target)].starts.add(start)
            self._news.notify_all()

    def read_into(self, target: Path, version: str, start: int, buffer: memoryview) -> bool:
        """As `Exchange` says. Raises PeerFailed."""
        import ray

        bringer = self._bringer(target, start)
        node = f"node {self._hosts[bringer]}"
        with self._asking:
            asked = self._peers[bringer].read.remote(self._key, self._name(target), version, start, len(buffer))
            try:
                answer = ray.get(asked, timeout=ANSWER)
            except ray.exceptions.GetTimeoutError:
                return False
            except ray.exceptions.RayError as error:
                said = " ".join(str(error).split())[:200]
                raise PeerFailed(f"{node}, which shares {target.name}, was lost ({said}): is it still up?") from None
            if isinstance(answer, str):
                raise PeerFailed(f"{node}, which shares {target.name}, {answer}")
            if answer is not None:
                buffer[:] = memoryview(answer)
        return answer is not None

    def _name(self, target: Path) -> str:
        return target.relative_to(self._root).as_posix()

    def _bringer(self, target: Path, start: int) -> int:
        return bringer(self._first[self._name(target)], start, len(self._hosts))

    def _end(self, said: str, *, failed: bool) -> None:
        with self._news:
            self._ended, self._failed = said, failed
            self._news.notify_all()


def first_chunks(sizes: Mapping[str, int]) -> dict[str, int]:
    """File → number of its first chunk, where the chunks of all files (bytes) are counted one after the other."""
    first, chunks = {}, 0
    for name, size in sorted(sizes.items()):
        first[name] = chunks
        chunks += -(-size // CHUNK)
    return first


def bringer(first: int, start: int, nodes: int) -> int:
    """Which of the nodes brings the chunk at byte `start` of a file: they take turns, through all files, so that each
    brings about as much of few large files as of many small ones."""
    return (first + start // CHUNK) % nodes


def requests_at_once(nodes: int) -> int:
    """So many chunks may a node ask of others at once: if all ask the same one, its object store holds `STORE_BYTES` of
    answers, whatever the model's size. (More than 128 other nodes ask for one chunk each.)"""
    return max(1, min(STANDARD_BUDGET.concurrency, STORE_BYTES // (CHUNK * (nodes - 1))))


@contextmanager
def sharing(nodes: Sequence[tuple[str, str]]) -> Iterator[list[Any]]:
    """Ray actors (`Sharer`), one on each of these nodes (id, host), until the block ends."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    hosts = [host for _, host in nodes]
    threads = (len(nodes) - 1) * requests_at_once(len(nodes)) + 2  # every request that others may have open, and ours
    actor = ray.remote(num_cpus=0, max_concurrency=threads)(Sharer)
    sharers = [
        actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(number, hosts)
        for number, (node, _) in enumerate(nodes)
    ]
    try:
        yield sharers
    finally:
        for sharer in sharers:
            ray.kill(sharer)


def check_same(copies: Mapping[str, Copy]) -> None:
    """LlmftError where nodes (host → copy) hold different bytes: possible only for a source without a manifest, which
    somebody overwrote between one node's look and another's."""
    (first, copy), *others = copies.items()
    for host, other in others:
        if copy != other:
            names = [name for name, sha256 in sorted(other[1].items()) if copy[1].get(name) != sha256]
            raise LlmftError(
                f"node {host}: {(names or ['the source'])[0]} is another one than on node {first}: somebody writes at "
                f"the source; remove mirror/{other[0]} from LLMFT_CACHE on all nodes and start again"
            )
