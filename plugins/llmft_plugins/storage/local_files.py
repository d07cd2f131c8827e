"""fsspec's local filesystem, made as strict as an object store: a file is there whole or not at all.

Apart from `local.py`, because importing fsspec takes 0.2 s that `llmft --help` should not pay.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem


class LocalFiles(LocalFileSystem):  # type: ignore[misc]
    """`put_file` and `pipe_file` write beside the final path, reach the disk, then rename. Raises OSError."""

    def put_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        """Copy the local file `path1` to `path2`."""
        with open(path1, "rb") as source, self._appearing(path2) as target:
            shutil.copyfileobj(source, target, 16 * 2**20)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Write `value` to `path`; `mode="create"` refuses to write over a file."""
        with self._appearing(path, exclusive=mode == "create") as target:
            target.write(value)

    @contextmanager
    def _appearing(self, path: str, *, exclusive: bool = False) -> Iterator[BinaryIO]:
        path = self._strip_protocol(path)
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.part")
        try:
            with open(temporary, "xb") as target:
                yield target
                target.flush()
                os.fsync(target.fileno())
            if exclusive:
                os.link(temporary, path)  # unlike a rename, this fails where the name is taken
            else:
                os.replace(temporary, path)
        finally:
            if os.path.lexists(temporary):
                os.remove(temporary)
