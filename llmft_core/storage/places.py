"""A place is a path in a storage backend; every URI of a run finds its backend here, by scheme."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError
from llmft_core.extensions import RangedReads, StorageBackend, VerifiedUploads

_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

# One filesystem for each backend of this process, so that no plugin has to keep its own: connections are reused.
_filesystems: WeakKeyDictionary[StorageBackend, Any] = WeakKeyDictionary()
_ranged_reads: WeakKeyDictionary[StorageBackend, RangedReads | None] = WeakKeyDictionary()
_verified_uploads: WeakKeyDictionary[StorageBackend, VerifiedUploads | None] = WeakKeyDictionary()
_opening = threading.Lock()
for _opened in (_filesystems, _ranged_reads, _verified_uploads):
    os.register_at_fork(after_in_child=_opened.clear)  # an open connection does not survive a fork


def checked_name(name: str) -> str:
    """A relative path (`a`, `a/b`) that stays below where it is put, unchanged. Raises InputError for anything else:
    `..`, absolute, empty, a backslash, a control character."""
    parts = name.split("/")
    if "\\" in name or _CONTROL.search(name) or any(part in ("", ".", "..") for part in parts):
        raise InputError(
            f"{name!r} is not a relative path in storage: use names joined by single slashes, without `..`, "
            "backslashes and control characters"
        )
    return name


@dataclass(frozen=True)
class Place:
    """A file or folder in storage: `path` is the backend's own (`bucket/key`, `/folder/file`), without a slash at its
    end."""

    backend: StorageBackend
    path: str

    @property
    def uri(self) -> str:
        """As users write it."""
        return self.backend.uri(self.path)

    @property
    def parent(self) -> Place:
        """The folder that it lies in."""
        return Place(self.backend, self.path.rpartition("/")[0])

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def fs(self) -> Any:
        """The backend's `fsspec` filesystem, opened once a process. Raises InputError where credentials are missing."""
        with _opening:
            if self.backend not in _filesystems:
                _filesystems[self.backend] = self.backend.filesystem()
            return _filesystems[self.backend]

    @property
    def ranged_reads(self) -> RangedReads | None:
        """The backend's own way to read, opened once a process, where it has one."""
        with _opening:
            if self.backend not in _ranged_reads:
                _ranged_reads[self.backend] = self.backend.ranged_reads()
            return _ranged_reads[self.backend]

    @property
    def verified_uploads(self) -> VerifiedUploads | None:
        """The backend's own way to write, opened once a process, where it has one."""
        with _opening:
            if self.backend not in _verified_uploads:
                _verified_uploads[self.backend] = self.backend.verified_uploads()
            return _verified_uploads[self.backend]

    def __truediv__(self, name: str) -> Place:
        """A file or folder below this one. Raises InputError for a name that leads out of it."""
        return Place(self.backend, f"{self.path.rstrip('/')}/{checked_name(name)}")

    def __str__(self) -> str:
        return self.uri


class Places:
    """The storage of one run: its own backend and those that its URIs need, each made once.

    `storage_choice` is the plan's `storage`; `backends` holds options by backend name for the others.
    """

    def __init__(
        self, catalog: Catalog, storage_choice: dict[str, Any] | None, backends: Mapping[str, dict[str, Any]]
    ) -> None:
        self._catalog = catalog
        self._choice = storage_choice
        self._options = backends
        self._made: dict[str, StorageBackend] = {}

    def place(self, uri_or_path: str) -> Place:
        """Where `s3://bucket/key`, `file:///folder` or a plain path points. Raises InputError: unknown scheme, no
        bucket, a path with `..` in a URI, wrong options."""
        found = _URI.fullmatch(uri_or_path)
        scheme = found["scheme"].lower() if found else "file"
        rest = found["rest"] if found else uri_or_path
        backend = self._backend(self._catalog.backend_for(scheme).name)
        if scheme == "file":
            return Place(backend, _local_path(rest, uri_or_path, is_uri=found is not None))
        path = rest.rstrip("/")
        if not path:
            raise InputError(f"{uri_or_path} names no bucket: write {scheme}://BUCKET/PATH")
        try:
            return Place(backend, checked_name(path))
        except InputError as error:
            raise InputError(f"{uri_or_path}: {error}") from None

    def runs(self) -> Place:
        """The folder in which runs lie: `<root>/runs`. Raises InputError where the storage lacks an option."""
        if self._choice is None:
            raise InputError("no storage for runs is chosen: give --storage NAME")
        backend = self._backend(str(self._choice["name"]))
        return Place(backend, f"{backend.root().rstrip('/')}/runs")

    def _backend(self, name: str) -> StorageBackend:
        if name not in self._made:
            run_storage = self._choice is not None and self._choice["name"] == name
            options = self._choice if run_storage and self._choice else self._options.get(name, {})
            backend: StorageBackend = self._catalog.create("storage", {**options, "name": name})
            backend.flags = "storage" if run_storage else f"backends.{name}"
            self._made[name] = backend
        return self._made[name]


def _local_path(rest: str, given: str, *, is_uri: bool) -> str:
    """An absolute path. A URI may say `localhost`, no other host."""
    if is_uri:
        rest = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
        if not rest.startswith("/"):
            raise InputError(f"{given} names a host or is relative: write file:///FOLDER or the plain path")
    if not rest or "\x00" in rest:
        raise InputError(f"{given!r} is not a path")
    return os.path.abspath(rest if is_uri else Path(rest).expanduser())
