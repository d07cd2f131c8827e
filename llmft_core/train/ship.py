"""Folders of the driver's cache onto the nodes that lack them: in chunks through Ray's objects, whatever their size."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llmft_core.errors import LlmftError
from llmft_core.train.cluster import Cluster, Node, collected, on_each_node
from llmft_core.weights.cache import cache_folder

CHUNK = 16 << 20  # bytes
AT_ONCE = 8
"""Chunks that are on their way: what the driver's object store holds of them, whatever the number of nodes."""
DISCARD = 10.0
"""Seconds that nodes have to remove what is not whole, after another one has failed."""


def ship(cluster: Cluster, keys: Sequence[str]) -> dict[Node, list[str]]:
    """Copies folders of this machine's cache, named by their place in it, to the nodes in whose caches they are not;
    says what went where. A folder appears on a node whole and with the same bytes, or not at all.

    Raises LlmftError with the node's name where one is lost, or has no room."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = on_each_node(cluster, missing_here, keys)
    lacking = {node: missing for node, missing in found.items() if missing}
    if not lacking:
        return {}
    actor = ray.remote(num_cpus=0)(Receiver)
    receivers = {
        node: actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
        for node in lacking
    }
    try:
        for key in keys:
            those = {node: receivers[node] for node, missing in lacking.items() if key in missing}
            if those:
                _send(key, those)
    finally:
        ray.wait([one.discard.remote() for one in receivers.values()], num_returns=len(receivers), timeout=DISCARD)
        for one in receivers.values():
            ray.kill(one)
    return lacking


def _send(key: str, receivers: Mapping[Node, Any]) -> None:
    import ray

    folder = cache_folder() / key
    on_their_way: deque[dict[Node, Any]] = deque()
    digests: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name, hasher = path.relative_to(folder).as_posix(), hashlib.sha256()
        for chunk in _chunks(path):
            hasher.update(chunk)
            held = ray.put(chunk)  # once, however many nodes: they pass it on to each other
            on_their_way.append({node: one.write.remote(key, name, held) for node, one in receivers.items()})
            del held
            if len(on_their_way) == AT_ONCE:
                collected(on_their_way.popleft())
        digests[name] = hasher.hexdigest()
    while on_their_way:
        collected(on_their_way.popleft())
    collected({node: one.finish.remote(key, digests) for node, one in receivers.items()})


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes; one empty chunk where it has none, so that it is made there too."""
    with path.open("rb") as file:
        yield file.read(CHUNK)
        while chunk := file.read(CHUNK):
            yield chunk


def missing_here(keys: Sequence[str]) -> list[str]:
    """Runs on a node: which of the folders its cache lacks."""
    return [key for key in keys if not (cache_folder() / key).is_dir()]


class Receiver:
    """One node's end: a Ray actor that writes what comes, in the order in which it was sent."""

    def __init__(self) -> None:
        self._drafts: dict[str, Path] = {}
        self._name = ""
        self._file: IO[bytes] | None = None  # the one that is being written
        self._hashers: dict[str, Any] = {}

    def write(self, key: str, name: str, chunk: bytes) -> None:
        """The next bytes of a file. Raises LlmftError where they cannot be written."""
        try:
            if key not in self._drafts:
                draft = (cache_folder() / key).with_name(f"{Path(key).name}.{uuid.uuid4().hex}.partial")
                draft.mkdir(parents=True)
                self._drafts[key] = draft
                self._hashers = {}
            if name != self._name or self._file is None:
                self._close()
                path = self._drafts[key] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._name, self._file = name, path.open("wb")
                self._hashers[name] = hashlib.sha256()
            self._hashers[name].update(chunk)
            self._file.write(chunk)
        except OSError as error:
            self.discard()
            raise LlmftError(
                f"cannot write the prepared data to {(cache_folder() / key).parent}: {error.strerror or error}; make "
                "room there, or set LLMFT_CACHE on that node to a folder that has it"
            ) from error

    def finish(self, key: str, digests: Mapping[str, str]) -> None:
        """All has come: the folder gets its name. Raises LlmftError where a file is not what was sent."""
        self._close()
        draft, folder = self._drafts.pop(key), cache_folder() / key
        came = {name: hasher.hexdigest() for name, hasher in self._hashers.items()}
        if came != digests:
            wrong = sorted(name for name in {*came, *digests} if came.get(name) != digests.get(name))
            shutil.rmtree(draft)
            raise LlmftError(f"{', '.join(wrong)} of {key} did not come as it was sent: start again")
        try:
            draft.rename(folder)
        except OSError:
            shutil.rmtree(draft)
            if not folder.is_dir():  # else another run has just put the same content there
                raise

    def discard(self) -> None:
        """Remove what is not whole."""
        self._file = None
        for draft in self._drafts.values():
            shutil.rmtree(draft, ignore_errors=True)
        self._drafts.clear()

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._name, self._file = "", None
