"""Where runs lie, and what a store can do beyond a plain filesystem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from llmft_core.extensions.base import Extension


class StorageBackend(Extension, ABC):
    """A place for runs: an fsspec filesystem and a root in it. The core derives transfers, publishing and probes."""

    scheme: ClassVar[str]
    """The URI scheme it answers to: `s3` for `s3://bucket/key`."""

    @abstractmethod
    def filesystem(self) -> Any:
        """An `fsspec.AbstractFileSystem` that pickles and has explicit time-outs. No secret is taken from options."""

    @abstractmethod
    def root(self) -> str:
        """Path in the filesystem under which runs lie (`bucket/prefix`). InputError where an option is missing."""

    def shared_by_nodes(self) -> bool:
        """Whether every node of a cluster sees the same files: true for object stores."""
        return True

    def ranged_reads(self) -> RangedReads | None:
        """A faster way to read than the filesystem's `cat_file`, made once a process; None: there is none."""
        return None

    def verified_uploads(self) -> VerifiedUploads | None:
        """Uploads of which the store verifies every part, made once a process. None: the core uses the filesystem's
        `put_file` and then reads everything back."""
        return None

    creates_exclusively: ClassVar[bool] = False
    """Whether `filesystem().pipe_file(path, data, mode="create")` raises FileExistsError where a file is there, even
    when two processes write at once. Not every server behind one protocol keeps this."""

    flags: str = "storage"
    """Where its options are in the plan: `backends.NAME` unless it is the run's storage. Set by the core."""

    def explain(self, error: BaseException, path: str) -> str:
        """A store's own error as one line that names the thing, the cause and the next action. It may speak of
        `--storage.…`: where the options stand elsewhere in this plan, the core says so instead."""
        return f"{path}: {type(error).__name__}: {error}"

    def uri(self, path: str) -> str:
        """A path of the filesystem as users write it."""
        return f"{self.scheme}://{path}"


class RangedReads(ABC):
    """Reads of a store straight into memory, from many threads at once. A store's own errors are raised as they are,
    with FileNotFoundError for what is not there; the core repeats, explains and ends them."""

    @abstractmethod
    def describe(self, path: str) -> tuple[int, str]:
        """Bytes of a file as it is now, and its version: another one (ETag, generation) after every change."""

    def describe_many(self, paths: Sequence[str]) -> dict[str, tuple[int, str]]:
        """What `describe` tells of these files, as far as one request can (a listing); the others are asked for one by
        one. {} where the store lists no such version, or the user may not list."""
        return {}

    @abstractmethod
    def read_into(self, path: str, version: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` on, from exactly this version: ChangedMeanwhile where it is another one.
        Fewer bytes are a ConnectionError."""


class VerifiedUploads(ABC):
    """Uploads in which no other bytes than ours get to a path: a checksum of ours travels with the data, and the store
    refuses what does not match it (a ConnectionError, so that they are sent again); of a part, which nobody sees before
    `complete`, the store's own checksum may be compared instead. Called from many threads."""

    least_part: ClassVar[int] = 5 * 2**20
    """Bytes of every part but the last, at least."""
    most_parts: ClassVar[int] = 10_000

    @abstractmethod
    def put(self, path: str, data: memoryview) -> None:
        """A whole file in one request, over one that is there."""

    @abstractmethod
    def begin(self, path: str) -> str:
        """The id of a new upload in parts. Nothing is at `path` before `complete`."""

    @abstractmethod
    def unfinished(self, path: str) -> str | None:
        """The newest upload to this path that was begun, by this process or another, and not completed."""

    @abstractmethod
    def parts(self, path: str, upload: str) -> dict[int, tuple[int, str]]:
        """Parts that the store holds: number (from 1) → (bytes, tag)."""

    @abstractmethod
    def tag(self, data: memoryview) -> str:
        """The tag by which this store lists a part with this content: one of another content has another tag. Where
        it cannot be known (the store encrypts), a tag that no part has: an upload is then begun anew."""

    @abstractmethod
    def put_part(self, path: str, upload: str, number: int, data: memoryview) -> str:
        """Send one part, and return its tag once the store is known to hold just these bytes."""

    @abstractmethod
    def complete(self, path: str, upload: str, tags: Sequence[str]) -> bool:
        """Make the file of the parts 1, 2, …: it appears whole. FileNotFoundError where the upload is gone. Returns
        whether the answer shows that it is made of just these parts; where not, the core asks for its size."""

    @abstractmethod
    def abandon(self, path: str, upload: str) -> None:
        """Delete what was sent."""
