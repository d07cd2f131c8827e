"""Whether a storage can do what runs need: `probe` before each run, `examine` for `llmft storage check`."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmft_core.errors import InputError, LlmftError
from llmft_core.storage.engine import Progress
from llmft_core.storage.faults import Patience, attempt, refused
from llmft_core.storage.objects import info, modified, store
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import create, download_many, list_names, read_bytes, upload_many

PREFIX = ".llmft-probe-"
PATIENCE = Patience(attempts=2, first_wait=0.5, deadline=10, limit=40)  # soon rather than surely
LATENCY_REQUESTS = 7
SLOW_REQUEST = 1.0  # seconds
REFUSED = "refused"
SKEW_NOTE = 60.0  # seconds
SKEW_WRONG = 300.0  # seconds; AWS refuses a signature that is 15 minutes off, Google and others one of 5

NEEDED_FOR = {
    "write": "without it nothing is saved: no plan, no metrics, no checkpoint",
    "read": "without it no upload is confirmed, and `generate`, `checkpoint pull` and weights from here do not work",
    "list": "without it nobody knows which runs and checkpoints there are, or whether a run's name is free",
    "delete": "without it `keep-last`, `keep-best` and `checkpoint prune` do not work, and each check leaves its probe",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "note", "wrong", "unknown"]
    """`note`: works, but not as well as it might; `unknown`: could not be tried because of something else."""
    what: str
    message: str


class Probe:
    """A small object below a place, and what is done with it step by step. Each step raises LlmftError."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.sample = place / f"{PREFIX}{uuid.uuid4().hex}"
        self.content = f"llmft probe {uuid.uuid4().hex}\n".encode()

    def write(self) -> None:
        """Put it there."""
        attempt(self.place, lambda: store(self.sample, self.content), PATIENCE)

    def read(self) -> None:
        """Read it back, and compare."""
        returned = attempt(self.place, lambda: self.place.fs.cat_file(self.sample.path), PATIENCE)
        if returned != self.content:
            raise InputError(f"{self.sample.uri} came back as {len(returned)} other bytes: this storage damages files")

    def list(self) -> None:
        """Find it in a listing."""
        if self.sample.name not in list_names(self.place):
            raise InputError(
                f"{self.sample.uri} was written and is not listed: this storage's listings are stale, and checkpoints "
                "would be taken for incomplete"
            )

    def delete(self) -> None:
        """Remove it."""
        attempt(self.place, lambda: self.place.fs.rm_file(self.sample.path), PATIENCE)


STEPS: dict[str, tuple[str, Callable[[Probe], None]]] = {
    "write": ("write to", Probe.write),
    "read": ("read from", Probe.read),
    "list": ("list what is in", Probe.list),
    "delete": ("delete from", Probe.delete),
}
"""In this order: what is done, how an error says it, how it is done."""


def probe(place: Place) -> None:
    """Writes, reads back, compares, lists and deletes a small object below `place`. Raises InputError: storage that
    cannot do this is found before anything is started."""
    trial = Probe(place)
    with _own_folders(place):
        for doing, step in STEPS.values():
            try:
                step(trial)
            except LlmftError as error:
                raise InputError(f"cannot {doing} storage: {error}") from error.__cause__


def examine(place: Place, size: int, progress: Callable[[str], Progress]) -> Generator[Finding, None, None]:
    """All that `llmft storage check` finds out, one by one as it is known. `size`: bytes of the file by which the
    throughput is measured, 0 for none; `progress` is asked for a bar by the name of what is measured.

    Goes on after an error where the next step still can say something. Removes all that it wrote, also where the caller
    ends it early (closing the iterator) and after an error or Ctrl-C.
    """
    trial = Probe(place)
    large = place / f"{trial.sample.name}-large"
    single = place / f"{trial.sample.name}-create"
    wrote: list[Place] = []
    with _own_folders(place):
        try:
            before = time.time()
            written = _step("write", trial)
            after = time.time()
            yield written
            if written.state == "ok":
                wrote.append(trial.sample)
                read = _step("read", trial)
                yield read
                yield _step("list", trial)
                yield _clock(trial.sample, (before + after) / 2)
                wrote.append(single)
                yield _create(single)
                if read.state == "ok":
                    yield _latency(trial)
                    if size:
                        wrote.append(large)
                        yield from _throughput(large, size, progress)
                deleted = _step("delete", trial)
                yield deleted
                if deleted.state == "ok":
                    wrote.remove(trial.sample)
            else:
                listed = _listing(place)
                if listed.state == "ok" and not written.message.startswith(REFUSED):
                    wrote.append(trial.sample)  # after a time-out it may be there all the same
                if listed.state == "ok" or listed.message.startswith(REFUSED):
                    yield listed
                    untried = ["read", "delete"]
                else:  # the store or the bucket is not there: the first line says all
                    untried = ["read", "list", "delete"]
                yield Finding("unknown", "rest", f"{', '.join(untried)}: not tried, as nothing could be written")
        finally:
            left = [one.uri for one in wrote if not _removed(one)]
    if left:
        yield Finding("note", "leftovers", f"could not be removed: {', '.join(left)}: remove them by other means")


def _step(name: str, trial: Probe) -> Finding:
    try:
        STEPS[name][1](trial)
    except LlmftError as error:
        return _failed(name, error)
    return Finding("ok", name, {"read": "what was written came back"}.get(name, "permitted"))


def _listing(place: Place) -> Finding:
    """Whether the folder may be listed, where nothing could be written into it."""
    try:
        list_names(place)
    except LlmftError as error:
        return _failed("list", error)
    return Finding("ok", "list", "permitted")


def _failed(name: str, error: LlmftError) -> Finding:
    is_refused = error.__cause__ is not None and refused(error.__cause__)
    said = f"{REFUSED}: {error}" if is_refused else str(error)
    return Finding("wrong", name, f"{said}; {NEEDED_FOR[name]}")


def _create(place: Place) -> Finding:
    """Whether a second writer of one name is turned away."""
    follows = (
        "two runs that are started under one name in the same moment are kept apart only by a lease that each reads "
        "back after a second: give every run a --name of its own, or none (the default has the time in it)"
    )
    if not place.backend.creates_exclusively:
        return Finding("note", "create", f"storage {place.backend.name} has no create-if-absent: {follows}")
    try:
        kept = create(place, b"first\n") and not create(place, b"second\n") and read_bytes(place) == b"first\n"
    except LlmftError as error:
        return Finding("note", "create", f"a file cannot be created only where none is there ({error}): {follows}")
    if kept:
        return Finding("ok", "create", "a second writer of the same name is turned away")
    return Finding(
        "note",
        "create",
        f"this server ignores the condition, and writes over the file: {follows}",
    )


def _latency(trial: Probe) -> Finding:
    times = []
    try:
        for _ in range(LATENCY_REQUESTS):
            began = time.perf_counter()
            trial.read()
            times.append(time.perf_counter() - began)
    except LlmftError as error:
        return _failed("read", error)
    middle = statistics.median(times)
    said = f"{1000 * middle:.1f} ms, the median of {len(times)} reads of a small object"
    if middle > SLOW_REQUEST:
        return Finding("note", "latency", f"{said}: slow; is the bucket in another region, or the line busy?")
    return Finding("ok", "latency", said)


def _clock(place: Place, local: float) -> Finding:
    try:
        there = modified(info(place))
    except LlmftError as error:
        return _failed("read", error)
    return clock_finding(None if there is None else there - local)


def clock_finding(skew: float | None) -> Finding:
    """What a store's clock, so many seconds ahead of this machine's, means. Stores tell whole seconds."""
    if skew is None:
        return Finding("unknown", "clock", "the store does not say when a file was written")
    if abs(skew) < SKEW_NOTE:
        return Finding("ok", "clock", f"within {max(2, round(abs(skew)) + 1)} s of the store's")
    way = "behind" if skew > 0 else "ahead of"
    said = f"this machine's clock is {abs(skew):.0f} s {way} the store's"
    if abs(skew) > SKEW_WRONG:
        return Finding("wrong", "clock", f"{said}: signed requests are refused, here or soon: set it by NTP (chrony)")
    return Finding("note", "clock", f"{said}: beyond 5 minutes signed requests are refused: set it by NTP (chrony)")


def _throughput(place: Place, size: int, progress: Callable[[str], Progress]) -> Iterator[Finding]:
    """Up and down, by the same code as checkpoints and weights: hashed, verified, written to a local disk."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="llmft-storage-check-"))
    except OSError as error:
        raise LlmftError(f"no temporary file can be made ({error}): set TMPDIR to a folder with room") from error
    try:
        try:
            (folder / "up").write_bytes(os.urandom(size))
        except OSError as error:
            raise LlmftError(
                f"{folder} does not take {size} bytes ({error}): set TMPDIR to a larger disk, or give a smaller --size"
            ) from error
        for name, doing in (("upload", "write"), ("download", "read")):
            began = time.perf_counter()
            try:
                if name == "upload":
                    (sha256,) = upload_many([(folder / "up", place)], progress=progress(name))
                else:
                    download_many([(place, folder / "down", sha256)], progress=progress(name))
            except LlmftError as error:
                yield Finding("wrong", name, _failed(doing, error).message)
                return
            rate = size / (time.perf_counter() - began)  # bytes/s
            yield Finding("ok", name, f"{rate / 1e6:.0f} MB/s ({size / 2**20:.0f} MiB, verified)")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _removed(place: Place) -> bool:
    """Deletes what a check may have written, with the parts of an upload that was interrupted; False where that
    failed."""

    def remove() -> None:
        writes = place.verified_uploads
        unfinished = writes.unfinished(place.path) if writes is not None else None
        if writes is not None and unfinished is not None:
            writes.abandon(place.path, unfinished)
        place.fs.invalidate_cache()
        if place.fs.exists(place.path):
            place.fs.rm_file(place.path)

    try:
        attempt(place, remove, PATIENCE)
    except LlmftError:
        return False  # the report names what is left
    return True


@contextmanager
def _own_folders(place: Place) -> Iterator[None]:
    """Folders that writing below `place` makes are removed in the end. Object stores have none."""
    folder = Path(place.path)
    made = [one for one in (folder, *folder.parents) if not one.exists()] if place.backend.scheme == "file" else []
    try:
        yield
    finally:
        for one in made:
            with suppress(OSError):  # somebody writes there already
                one.rmdir()
