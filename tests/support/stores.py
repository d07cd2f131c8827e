"""S3 or Google behind a proxy, for tests of what both have to outlive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fault_proxy import Proxy, google_refusal, refusal
from transfers import CATALOG

from llmft_core.storage.places import Place, Places


@dataclass
class Store:
    """One of the servers behind a proxy. `refused` makes its answer of an error: status, S3's code, Google's words."""

    name: str
    proxy: Proxy
    options: dict[str, Any]

    @property
    def folder(self) -> Place:
        return Places(CATALOG, {"name": self.name, **self.options}, {}).runs()

    @property
    def flags(self) -> list[str]:
        given = {f"--storage.{name}": value for name, value in self.options.items()}
        words = [[name] if value is True else [name, str(value)] for name, value in given.items()]
        return ["--storage", self.name, *(word for pair in words for word in pair)]

    def refused(self, status: str, code: str, *headers: str) -> bytes:
        return refusal(status, code, *headers) if self.name == "s3" else google_refusal(status, code, *headers)

    def reads(self, head: bytes) -> bool:
        """Whether a request asks for a file's bytes."""
        return head.startswith(b"GET " if self.name == "s3" else b"GET /download/")
