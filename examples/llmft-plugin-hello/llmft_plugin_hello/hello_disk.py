"""A storage backend: a folder of this machine under the scheme `hello`. For another store, return its filesystem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, field_validator

from llmft_core import Options, StorageBackend, hookimpl

llmft_api = 1


class HelloDiskOptions(Options):
    """Options of the backend."""

    root: Path = Field(description="folder under which runs are written")

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: Path) -> Path:
        # Workers build the backend again in folders of their own: what was relative would be another place there.
        return root.expanduser().absolute()


class HelloDisk(StorageBackend):
    """Files under one folder."""

    name = "hello-disk"
    summary = "a folder of this machine, as an example of a storage backend"
    options_type = HelloDiskOptions
    scheme = "hello"

    def filesystem(self) -> Any:
        """The local filesystem of fsspec; folders are made when a file is written."""
        return LocalFileSystem(auto_mkdir=True)

    def root(self) -> str:
        """The folder."""
        return str(self.options.root)

    def shared_by_nodes(self) -> bool:
        """A folder of one machine: other nodes have another one."""
        return False

    def explain(self, error: BaseException, path: str) -> str:
        """The system's own words, and what to do."""
        cause = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        return f"{path}: {cause}: choose a folder that you may write to with --storage.root"


@hookimpl
def llmft_storage_backends() -> list[type[StorageBackend]]:
    """A folder."""
    return [HelloDisk]
