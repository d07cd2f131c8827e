"""Google's objects: ranged reads, and uploads in parts that the store verifies and composes (docs/decisions/0011).

A part is an object under a name of its own, so another process finds what an interrupted one has sent:

    <root>/.llmft-uploads/<hash of the file's path>/<upload>/00001, 00002, …

At the end `compose` makes the file of them, 32 at once: of more parts it makes larger pieces first (00001-00032).
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial, reduce
from typing import Any

from urllib3.exceptions import HTTPError

from llmft_core import ChangedMeanwhile, RangedReads, VerifiedUploads
from llmft_plugins.storage.gcs_client import PIECE, Checksums, DamagedOnTheWay, GcsClient, StoreError
from llmft_plugins.storage.gcs_crc32c import joined

UPLOADS = ".llmft-uploads"
"""The folder of parts, in that of the runs (`--storage.prefix`), else in the bucket."""
COMPOSED_AT_ONCE = 32  # Google's limit of one request
REQUESTS = 8  # at once, while an upload is completed
STALE = timedelta(days=1)  # nobody continues an older upload
_MARK = "llmft-upload"  # metadata of a composed object: which upload it is
_PIECE_NAME = re.compile(r"(\d{5,})(?:-(\d{5,}))?")


@dataclass(frozen=True)
class _Piece:
    """Parts `first` to `last` of an upload, as one."""

    first: int
    last: int
    checksums: Checksums
    source: dict[str, str] = field(default_factory=dict)
    """The object that it is, without the bucket: `name` and `generation`."""

    @classmethod
    def told(cls, item: dict[str, Any]) -> _Piece | None:
        """By an item of a listing; None where it is something else."""
        found = _PIECE_NAME.fullmatch(item["name"].rpartition("/")[2])
        if found is None:
            return None
        source = {"name": item["name"], "generation": item["generation"]}
        return cls(int(found[1]), int(found[2] or found[1]), Checksums.told(item), source)

    def __add__(self, after: _Piece) -> _Piece:
        """Both, one behind the other."""
        one, other = self.checksums, after.checksums
        crc = joined(one.crc32c, other.crc32c, other.size)
        return _Piece(self.first, after.last, Checksums("", crc, one.size + other.size))

    @property
    def tag(self) -> str:
        """By which the core knows a part's content."""
        return f"{self.checksums.md5}-{self.checksums.crc32c}-{self.checksums.size}"

    @classmethod
    def wanted(cls, number: int, tag: str) -> _Piece:
        """The part that has this tag."""
        md5, crc, size = tag.split("-")
        return cls(number, number, Checksums(md5, int(crc), int(size)))

    def is_content_of(self, other: _Piece) -> bool:
        """Whether it is the same bytes; of what was composed Google knows no MD5."""
        mine, its = self.checksums, other.checksums
        return (mine.crc32c, mine.size) == (its.crc32c, its.size) and ("" in (mine.md5, its.md5) or mine.md5 == its.md5)


class GcsObjects(RangedReads, VerifiedUploads):
    """Both for one client, whose errors it raises."""

    least_part = 1

    def __init__(self, client: GcsClient, root: str) -> None:
        """`root`: the path under which runs lie (`bucket/prefix`), or empty."""
        self._client, self._root = client, root

    # --- reads --------------------------------------------------------------------------------------------------

    def describe(self, path: str) -> tuple[int, str]:
        found = self._client.look(path)
        return int(found["size"]), str(found["generation"])

    def read_into(self, path: str, version: str, start: int, buffer: memoryview) -> None:
        if not buffer:
            return
        try:
            answer = self._client.read(path, version, start, start + len(buffer))
        except StoreError as error:
            if error.code == 412:
                raise _changed(path) from error
            if error.code == 416:
                raise ConnectionError(f"nothing came from byte {start} on") from error
            raise
        if answer.status_code != 206 and start:
            answer.close()
            raise StoreError(f"the whole of {path} came where a range was asked for", answer.status_code, {})
        done = 0
        try:
            while done < len(buffer) and (read := answer.raw.readinto(buffer[done : done + PIECE])):
                done += read
        except HTTPError as error:
            raise ConnectionError(f"the answer ended too early, from byte {start} of {path}: {error}") from error
        finally:
            answer.close()
        # Emulators ignore the condition, and do not tell in the answer what it is of.
        if (answer.headers.get("x-goog-generation") or self.describe(path)[1]) != version:
            raise _changed(path)
        if done < len(buffer):
            raise ConnectionError(f"{done} bytes came where {len(buffer)} were asked for, from byte {start}")

    # --- uploads ------------------------------------------------------------------------------------------------

    def put(self, path: str, data: memoryview) -> None:
        self._client.insert(path, data, Checksums.of(data))

    def begin(self, path: str) -> str:
        """Removes what was sent for older uploads to this path, too."""
        for upload, sent in self._uploads(path).items():
            if datetime.now(UTC) - sent > STALE:
                self.abandon(path, upload)
        return uuid.uuid4().hex

    def unfinished(self, path: str) -> str | None:
        uploads = self._uploads(path)
        return max(uploads, key=lambda upload: uploads[upload], default=None)

    def parts(self, path: str, upload: str) -> dict[int, tuple[int, str]]:
        pieces = self._pieces(path, upload)
        return {piece.first: (piece.checksums.size, piece.tag) for piece in pieces if piece.first == piece.last}

    def tag(self, data: memoryview) -> str:
        return _Piece(1, 1, Checksums.of(data)).tag

    def put_part(self, path: str, upload: str, number: int, data: memoryview) -> str:
        piece = _Piece(number, number, Checksums.of(data))
        self._client.insert(f"{self._folder(path)}{upload}/{number:05d}", data, piece.checksums)
        return piece.tag

    def complete(self, path: str, upload: str, tags: Sequence[str]) -> bool:
        """Goes on where an earlier call ended: the pieces that it made are used. Size and CRC32C of the whole are
        compared."""
        wanted = [_Piece.wanted(number, tag) for number, tag in enumerate(tags, 1)]
        pieces = self._cover(path, upload, wanted)
        if pieces:
            folder = f"{self._folder(path)}{upload}"
            with ThreadPoolExecutor(REQUESTS) as crew:
                while len(pieces) > COMPOSED_AT_ONCE:
                    groups = [pieces[at : at + COMPOSED_AT_ONCE] for at in range(0, len(pieces), COMPOSED_AT_ONCE)]
                    pieces = list(crew.map(partial(self._larger, folder), groups))
            self._compose(path, pieces, upload)
        elif not self._is_composed(path, upload, reduce(_Piece.__add__, wanted)):
            raise FileNotFoundError(f"parts of the upload {upload} to gs://{path} are no longer there")
        self.abandon(path, upload)
        return True

    def abandon(self, path: str, upload: str) -> None:
        bucket = path.partition("/")[0]
        left = [f"{bucket}/{item['name']}" for item in self._client.listed(f"{self._folder(path)}{upload}/")]
        with ThreadPoolExecutor(REQUESTS) as crew:
            list(crew.map(self._client.delete, left))

    # --- pieces -------------------------------------------------------------------------------------------------

    def _folder(self, path: str) -> str:
        """Where the parts of a file lie, with a slash at its end."""
        base = self._root if path.startswith(f"{self._root}/") else path.partition("/")[0]
        return f"{base}/{UPLOADS}/{hashlib.sha256(path.encode()).hexdigest()[:32]}/"

    def _uploads(self, path: str) -> dict[str, datetime]:
        """Unfinished uploads to a file, and when the last of what is there of each was sent."""
        folder = self._folder(path)
        inside = folder.partition("/")[2]
        found: dict[str, datetime] = {}
        for item in self._client.listed(folder):
            upload = item["name"].removeprefix(inside).partition("/")[0]
            sent = datetime.fromisoformat(item["timeCreated"])
            found[upload] = max(sent, found.get(upload, sent))
        return found

    def _pieces(self, path: str, upload: str) -> list[_Piece]:
        """What the store holds of an upload."""
        told = [_Piece.told(item) for item in self._client.listed(f"{self._folder(path)}{upload}/")]
        return [piece for piece in told if piece is not None]

    def _cover(self, path: str, upload: str, wanted: Sequence[_Piece]) -> list[_Piece]:
        """Pieces in the store that are all of the wanted parts, the largest that there are; none where a part is
        missing, or another one."""
        beginning: dict[int, list[_Piece]] = {}
        for piece in sorted(self._pieces(path, upload), key=lambda piece: -piece.last):
            beginning.setdefault(piece.first, []).append(piece)
        cover: list[_Piece] = []
        done = 0
        while done < len(wanted):
            fitting = (
                piece
                for piece in beginning.get(done + 1, [])
                if piece.last <= len(wanted) and piece.is_content_of(reduce(_Piece.__add__, wanted[done : piece.last]))
            )
            if (found := next(fitting, None)) is None:
                return []
            cover.append(found)
            done = found.last
        return cover

    def _larger(self, folder: str, pieces: Sequence[_Piece]) -> _Piece:
        """One piece of up to 32."""
        if len(pieces) == 1:
            return pieces[0]
        return self._compose(f"{folder}/{pieces[0].first:05d}-{pieces[-1].last:05d}", pieces, "")

    def _compose(self, path: str, pieces: Sequence[_Piece], upload: str) -> _Piece:
        """An object of up to 32 pieces, marked with an upload where it is all of it."""
        whole = reduce(_Piece.__add__, pieces)
        crc, mark = whole.checksums.crc32c, {_MARK: upload} if upload else {}
        made = self._client.compose(path, [piece.source for piece in pieces], crc, mark)
        found = Checksums.told(made)
        if (found.crc32c, found.size) != (crc, whole.checksums.size):  # Google has compared it; others may not
            self._client.delete(path)
            raise DamagedOnTheWay(f"the store composed {found.size} other bytes than the parts of gs://{path} hold")
        return replace(whole, source={"name": made["name"], "generation": made["generation"]})

    def _is_composed(self, path: str, upload: str, whole: _Piece) -> bool:
        """Whether the file was made of this upload: the answer to an earlier request was lost."""
        found = self._client.look(path)
        told = _Piece(whole.first, whole.last, Checksums.told(found))
        return found.get("metadata", {}).get(_MARK) == upload and told.is_content_of(whole)


def _changed(path: str) -> ChangedMeanwhile:
    return ChangedMeanwhile(f"gs://{path} was changed while it was downloaded: run it again once nobody writes there")
