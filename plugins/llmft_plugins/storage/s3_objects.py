"""S3's objects over botocore's synchronous client: ranged reads and uploads in parts that the store verifies.

Apart from `s3.py`, because the client is made only when something is transferred. s3fs moves all bytes through one
thread of asyncio; this one works in as many threads as ask (docs/decisions/0007).
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from llmft_core import ChangedMeanwhile, RangedReads, VerifiedUploads

CONNECTIONS = 64  # kept open at most; a transfer uses as many as its budget allows
PIECE = 2**20  # bytes read from a socket, or written to it, at once
_DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_NOT_FOR_YOU = {"AccessDenied", "403", "NotImplemented", "501", "MethodNotAllowed"}


class S3Objects(RangedReads, VerifiedUploads):
    """Both for one client. Raises botocore's errors, made like those of a file system where something is missing."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._other_tags: set[str] = set()  # buckets in which the tag of a part is not its MD5: they encrypt

    # --- reads --------------------------------------------------------------------------------------------------

    def describe(self, path: str) -> tuple[int, str]:
        with _as_file_errors():
            head = self._client.head_object(**_names(path))
        return int(head["ContentLength"]), str(head["ETag"])

    def describe_many(self, paths: Sequence[str]) -> dict[str, tuple[int, str]]:
        """By the first page (up to 1000 objects) of their common folder."""
        from botocore.exceptions import ClientError

        bucket, _, folder = os.path.commonpath(paths).partition("/")
        if not bucket:
            return {}  # in several buckets
        try:
            with _as_file_errors():
                page = self._client.list_objects_v2(Bucket=bucket, Prefix=f"{folder}/" if folder else "")
        except ClientError as error:
            if _code(error) in _NOT_FOR_YOU:
                return {}  # who may not list can still read
            raise
        found = {f"{bucket}/{entry['Key']}": entry for entry in page.get("Contents", [])}
        return {path: (int(found[path]["Size"]), f'"{_bare(found[path]["ETag"])}"') for path in paths if path in found}

    def read_into(self, path: str, version: str, start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        if not buffer:
            return
        with _as_file_errors(path):
            # Some stores ignore IfMatch: so the answer's ETag is compared as well.
            answer = self._client.get_object(**_names(path), Range=f"bytes={start}-{end - 1}", IfMatch=version)
        body = answer["Body"]
        try:
            if answer["ETag"] != version:
                raise _changed(path)
            done = 0
            while done < len(buffer):
                read = body.readinto(buffer[done : done + PIECE])
                if not read:
                    break
                done += read
        except _incomplete() as error:
            raise ConnectionError(f"the answer ended too early, from byte {start} of {path}: {error}") from error
        finally:
            body.close()
        if done < len(buffer):
            raise ConnectionError(f"{done} bytes came where {len(buffer)} were asked for, from byte {start}")

    # --- uploads ------------------------------------------------------------------------------------------------

    def put(self, path: str, data: memoryview) -> None:
        _send(self._client.put_object, path, data, hashlib.md5(data, usedforsecurity=False))

    def begin(self, path: str) -> str:
        with _as_file_errors():
            return str(self._client.create_multipart_upload(**_names(path))["UploadId"])

    def unfinished(self, path: str) -> str | None:
        from botocore.exceptions import ClientError

        names = _names(path)
        found: list[tuple[Any, str]] = []
        try:
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=names["Bucket"], Prefix=names["Key"]):
                found += [
                    (upload["Initiated"], upload["UploadId"])
                    for upload in page.get("Uploads", [])
                    if upload["Key"] == names["Key"]
                ]
        except ClientError as error:
            if _code(error) in _NOT_FOR_YOU:
                return None  # who may not list uploads can still make new ones
            if _code(error) == "NoSuchUpload":
                return None  # rclone's answer where there are none
            raise
        return max(found)[1] if found else None

    def parts(self, path: str, upload: str) -> dict[int, tuple[int, str]]:
        with _as_file_errors():
            pages = self._client.get_paginator("list_parts").paginate(**_names(path), UploadId=upload)
            listed = [part for page in pages for part in page.get("Parts", [])]
        return {int(part["PartNumber"]): (int(part["Size"]), _bare(part["ETag"])) for part in listed}

    def tag(self, data: memoryview) -> str:
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    def put_part(self, path: str, upload: str, number: int, data: memoryview) -> str:
        from botocore.exceptions import ClientError

        digest = hashlib.md5(data, usedforsecurity=False)
        method, bucket = self._client.upload_part, _names(path)["Bucket"]
        names = {"UploadId": upload, "PartNumber": number}
        if bucket not in self._other_tags:
            # The store makes the MD5 for its tag in any case. To send ours along would have it made twice.
            tag = _bare(_send(method, path, data, None, **names)["ETag"])
            if tag == digest.hexdigest():
                return tag
        # Other bytes arrived, or tags are no MD5s there: under ours the store refuses the first and takes the second.
        try:
            tag = _bare(_send(method, path, data, digest, **names)["ETag"])
        except ClientError as error:
            if _code(error) != "NotImplemented":
                raise
            self.abandon(path, upload)  # rclone keeps the part that it got first
            raise FileNotFoundError(f"part {number} arrived damaged, and the store takes no other: {error}") from error
        if tag != digest.hexdigest():
            self._other_tags.add(bucket)
        return tag

    def complete(self, path: str, upload: str, tags: Sequence[str]) -> bool:
        parts = [{"PartNumber": number, "ETag": f'"{tag}"'} for number, tag in enumerate(tags, 1)]
        with _as_file_errors():
            answer = self._client.complete_multipart_upload(
                **_names(path), UploadId=upload, MultipartUpload={"Parts": parts}
            )
        if _names(path)["Bucket"] in self._other_tags:
            return False
        digests = b"".join(map(bytes.fromhex, tags))
        whole = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(tags)}"
        return _bare(answer["ETag"]) == whole

    def abandon(self, path: str, upload: str) -> None:
        with _as_file_errors():
            self._client.abort_multipart_upload(**_names(path), UploadId=upload)


def _send(
    method: Callable[..., Any], path: str, data: memoryview, digest: hashlib._Hash | None, **names: Any
) -> dict[str, Any]:
    """With `digest`, the MD5 of our own bytes, the store refuses other bytes than these."""
    promise = {} if digest is None else {"ContentMD5": base64.b64encode(digest.digest()).decode()}
    with _as_file_errors(path):
        return cast(dict[str, Any], method(**_names(path), Body=_Body(data), **promise, **names))


class _Body:
    """Data on their way into a request, as botocore and urllib3 read them: piece by piece, each under a time-out of its
    own. In one piece, a part would have the connection's time-out (5 s) for all of its bytes: too little on a slow
    line. And it needs no copy, since botocore takes no memoryview."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int | None = None) -> memoryview:
        """At least so many bytes, if there are: urllib3 asks for 16 KiB, and takes what it gets."""
        end = len(self._data) if size is None or size < 0 else self._at + max(size, PIECE)
        piece = self._data[self._at : end]
        self._at += len(piece)
        return piece

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """botocore measures the body, and begins again after a redirect."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        self._at = base + offset
        return self._at


def _names(path: str) -> dict[str, str]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


def _bare(tag: str) -> str:
    return tag.strip('"')


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _changed(path: str) -> ChangedMeanwhile:
    return ChangedMeanwhile(f"s3://{path} was changed while it was downloaded: run it again once nobody writes there")


def _incomplete() -> tuple[type[Exception], ...]:
    from botocore.exceptions import IncompleteReadError
    from urllib3.exceptions import HTTPError

    return (IncompleteReadError, HTTPError)


@contextmanager
def _as_file_errors(path: str = "") -> Iterator[None]:
    """What is missing as FileNotFoundError, a damaged request as ConnectionError (to be sent again)."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        code = _code(error)
        if code in {"404", "NoSuchKey", "NoSuchUpload"}:
            raise FileNotFoundError(str(error)) from error
        if code in {"412", "PreconditionFailed"}:
            raise _changed(path) from error
        if code in _DAMAGED:
            raise ConnectionError(f"the store got other bytes than were sent ({code})") from error
        raise
