"""Google's JSON API over requests: a connection for each thread that asks, one attempt, errors with their headers.

gcsfs moves all bytes through one thread, repeats on its own for a minute, and keeps no `Retry-After`; the core repeats.
"""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import requests
from google.auth.exceptions import GoogleAuthError, TransportError
from requests.adapters import HTTPAdapter

from llmft_plugins.storage.gcs_crc32c import crc32c, decoded, encoded

CONNECT_TIMEOUT = 10  # seconds
READ_TIMEOUT = 60  # seconds without a byte
CONNECTIONS = 64  # kept open at most; a transfer uses as many as its budget allows
PIECE = 2**18  # bytes written to a socket at once: each piece has its own time-out
_DAMAGED = "doesn't match calculated"  # in Google's refusal of content that is not of the checksum beside it


class StoreError(Exception):
    """An answer of 400 and more: `code` is the HTTP status; the core looks for `Retry-After` in `headers`."""

    def __init__(self, said: str, code: int, headers: Mapping[str, str]) -> None:
        super().__init__(said)
        self.code, self.headers = code, dict(headers)


class DamagedOnTheWay(ConnectionError):
    """The store got other bytes than were sent; to be sent again."""


@dataclass(frozen=True)
class Checksums:
    """What Google keeps of an object."""

    md5: str  # as Google writes it; empty where the object was composed
    crc32c: int
    size: int  # bytes

    @classmethod
    def of(cls, data: memoryview) -> Checksums:
        """Of bytes of ours."""
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        return cls(base64.b64encode(md5).decode(), crc32c(data), len(data))

    @classmethod
    def told(cls, item: Mapping[str, Any]) -> Checksums:
        """Of an object, as the store tells them."""
        return cls(item.get("md5Hash", ""), decoded(item["crc32c"]), int(item["size"]))


class GcsClient:
    """Requests about objects. Raises FileNotFoundError for 404, DamagedOnTheWay, StoreError for what else the store
    refuses, and the errors of requests and google.auth."""

    def __init__(self, session: requests.Session, endpoint: str) -> None:
        """`session` adds the credentials; `endpoint`: URL without a slash at its end."""
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(pool_connections=4, pool_maxsize=CONNECTIONS))
        self._session, self._endpoint = session, endpoint

    # --- objects ------------------------------------------------------------------------------------------------

    def look(self, path: str) -> dict[str, Any]:
        """What the store says of an object."""
        return self._json("GET", _object(path))

    def listed(self, folder: str) -> list[dict[str, Any]]:
        """All objects below `bucket/folder`, with a slash at its end."""
        bucket, _, prefix = folder.partition("/")
        wanted = "items(name,size,md5Hash,crc32c,generation,timeCreated),nextPageToken"
        found: list[dict[str, Any]] = []
        query = {"prefix": prefix, "fields": wanted}
        while True:
            page = self._json("GET", f"/storage/v1/b/{quote(bucket)}/o", params=query)
            found += page.get("items", [])
            if not page.get("nextPageToken"):
                return found
            query["pageToken"] = page["nextPageToken"]

    def read(self, path: str, generation: str, start: int, end: int) -> requests.Response:
        """Bytes [start, end) of one generation, to be read from `raw`: StoreError 412 where it is another one."""
        return self._answer(
            "GET",
            f"/download{_object(path)}",
            params={"alt": "media", "ifGenerationMatch": generation},
            headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"},
            stream=True,
        )

    def insert(self, path: str, data: memoryview, checksums: Checksums) -> None:
        """A whole object in one request, over one that is there; the store refuses what does not match."""
        bucket, _, key = path.partition("/")
        told = {"md5Hash": checksums.md5, "crc32c": encoded(checksums.crc32c)}
        body = _Body(json.dumps(told), data)
        self._json(
            "POST",
            f"/upload/storage/v1/b/{quote(bucket)}/o",
            params={"uploadType": "multipart", "name": key},
            headers={"Content-Type": f"multipart/related; boundary={body.boundary}", "Content-Length": str(len(body))},
            data=body,
        )

    def compose(
        self, path: str, sources: list[dict[str, str]], crc: int, metadata: Mapping[str, str]
    ) -> dict[str, Any]:
        """One object of up to 32 of the same bucket (`name`, `generation`), which are deleted for good: neither early
        deletion nor soft delete is charged for them. Stores that do not know this leave them."""
        destination = {"contentType": "application/octet-stream", "crc32c": encoded(crc), "metadata": dict(metadata)}
        request = {"sourceObjects": sources, "destination": destination, "deleteSourceObjects": True}
        return self._json("POST", f"{_object(path)}/compose", json=request)

    def delete(self, path: str) -> None:
        """One that is gone already is no error: a repeated request may have removed it."""
        try:
            self._answer("DELETE", _object(path)).close()
        except FileNotFoundError:
            return

    # --- requests -----------------------------------------------------------------------------------------------

    def _json(self, method: str, path: str, **how: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._answer(method, path, **how).json()
        return found

    def _answer(self, method: str, path: str, **how: Any) -> requests.Response:
        timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
        try:
            answer = self._session.request(method, self._endpoint + path, timeout=timeout, **how)
        except GoogleAuthError as error:
            if error.retryable or isinstance(error, TransportError):
                raise ConnectionError(f"the credentials could not be refreshed: {error}") from error
            raise
        if answer.status_code < 400:
            return answer
        said = _message(answer)
        if answer.status_code == 404:
            raise FileNotFoundError(said)
        if answer.status_code == 400 and _DAMAGED in said:
            raise DamagedOnTheWay(f"the store got other bytes than were sent ({said})")
        raise StoreError(said, answer.status_code, answer.headers)


class _Body:
    """The body of an insert: what the object is, then its bytes, which are not copied. Sent again from the start where
    the credentials had to be refreshed."""

    def __init__(self, told: str, data: memoryview) -> None:
        self.boundary = uuid.uuid4().hex
        json_part = f"--{self.boundary}\r\nContent-Type: application/json\r\n\r\n{told}\r\n"
        self._head = f"{json_part}--{self.boundary}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
        self._data = data
        self._tail = f"\r\n--{self.boundary}--\r\n".encode()

    def __len__(self) -> int:
        return len(self._head) + len(self._data) + len(self._tail)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self._head
        for start in range(0, len(self._data), PIECE):
            yield self._data[start : start + PIECE]
        yield self._tail


def _object(path: str) -> str:
    bucket, _, key = path.partition("/")
    return f"/storage/v1/b/{quote(bucket)}/o/{quote(key, safe='')}"


def _message(answer: requests.Response) -> str:
    """What the store says of an error: Google's own words where it has some."""
    try:
        return f"{answer.status_code} {answer.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.reason} {answer.text[:200]}".rstrip()
