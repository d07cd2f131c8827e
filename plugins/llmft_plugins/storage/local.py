"""Runs in a folder of this machine, or of a file system that all nodes mount."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, field_validator

from llmft_core import Options, StorageBackend, hookimpl

llmft_api = 1


class LocalOptions(Options):
    """Options of `--storage local`."""

    model_config = ConfigDict(validate_default=True)

    root: str = Field("./llmft-runs", description="folder for runs; with several nodes one that all of them mount")

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: str) -> str:
        """Absolute in the plan already: a worker's working directory is another one."""
        if not root:
            raise ValueError("is empty: give a folder")
        return os.path.abspath(Path(root).expanduser())


class LocalStorage(StorageBackend):
    """Files as files. What is written appears whole or not at all."""

    name = "local"
    summary = "a folder of this machine or of a mounted file system"
    scheme = "file"
    options_type = LocalOptions
    creates_exclusively = True

    def filesystem(self) -> Any:
        from llmft_plugins.storage.local_files import LocalFiles

        return LocalFiles(auto_mkdir=True, use_listings_cache=False, skip_instance_cache=True)

    def root(self) -> str:
        return str(self.options.root)

    def shared_by_nodes(self) -> bool:
        return False

    def uri(self, path: str) -> str:
        return path

    def explain(self, error: BaseException, path: str) -> str:
        if isinstance(error, FileNotFoundError):
            return f"{path}: there is no such file or folder: check the path, and that this node mounts it"
        if isinstance(error, PermissionError):
            return f"{path}: not permitted for this user: change its permissions, or give another --storage.root"
        if isinstance(error, (NotADirectoryError, FileExistsError)):
            return f"{path}: a part of this path is a file, not a folder: give another --storage.root"
        if isinstance(error, IsADirectoryError):
            return f"{path}: this is a folder, not a file"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{path}: the disk is full ({error.strerror}): free space, or give another --storage.root"
        if isinstance(error, OSError) and error.errno == errno.EROFS:
            return f"{path}: this file system is mounted read-only: give another --storage.root"
        return super().explain(error, path)


@hookimpl
def llmft_storage_backends() -> list[type[StorageBackend]]:
    return [LocalStorage]
