"""Half-written files: what of them a later process trusts."""

from __future__ import annotations

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmft_core.storage.journal import Partial
from llmft_core.storage.ordered_hash import OrderedHash

ORIGIN = {"uri": "s3://b/k", "version": "1"}


A, B, C = b"a" * 10, b"b" * 10, b"c" * 10


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Chunks 0, 1 and 3 of four were written, then the process ended."""
    partial = Partial(tmp_path / "f", 40, 10, ORIGIN)
    digest = OrderedHash(partial.handle, partial.note)
    for index, chunk in ((1, B), (0, A), (3, C)):
        partial.write(index, memoryview(chunk))
        digest.add(index * 10, memoryview(bytearray(chunk)))
    partial.leave()
    return tmp_path / "f"


def again(target: Path, **other: object) -> int:
    """The bytes that a later process trusts."""
    partial = Partial(target, 40, 10, {**ORIGIN, **other})
    try:
        there = OrderedHash(partial.handle).resume(partial.points, memoryview(bytearray(7)))
        partial.trust(there)
        return there
    finally:
        partial.leave()


def test_what_was_noted_is_continued(begun: Path) -> None:
    assert not begun.exists()
    assert again(begun) == 20
    assert again(begun) == 20
    partial = Partial(begun, 40, 10, ORIGIN)
    for index in (2, 3):
        partial.write(index, memoryview(C))
    partial.finish()
    assert begun.read_bytes() == A + B + C + C
    assert [path.name for path in begun.parent.iterdir()] == ["f"]


def test_another_version_or_uri_is_begun_anew(begun: Path) -> None:
    assert again(begun, version="2") == 0
    assert list(begun.parent.iterdir()) == []


def test_a_file_that_was_cut_is_begun_anew(begun: Path) -> None:
    os.truncate(begun.parent / ".f.part", 39)
    assert again(begun) == 0


@pytest.mark.parametrize(("byte", "trusted"), [(0, 0), (15, 10), (25, 20)])
def test_a_torn_chunk_is_not_trusted(begun: Path, byte: int, trusted: int) -> None:
    """As after a power cut: noted, but the disk never got it."""
    with (begun.parent / ".f.part").open("r+b") as file:
        file.seek(byte)
        file.write(b"\0")
    assert again(begun) == trusted
    assert again(begun) == trusted


@pytest.mark.parametrize(
    "torn", ["[30", "[30]", '{"1": 2}\n', '[30, "0"]\n', '[25, "0"]\n', "[true, 1]\n", "7\n", "\0\n"]
)
def test_a_torn_note_is_not_trusted(begun: Path, torn: str) -> None:
    with (begun.parent / ".f.part.journal").open("a") as file:
        file.write(torn)
    assert again(begun) == 20
    assert again(begun) == 20, "and what follows it is not lost"


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    first, second = (Partial(tmp_path / "f", 20, 10, ORIGIN) for _ in range(2))
    for partial, letter in ((first, b"1"), (second, b"2")):
        partial.write(0, memoryview(letter * 10))
        partial.write(1, memoryview(letter * 10))
    first.finish()
    assert (tmp_path / "f").read_bytes() == b"1" * 20
    second.finish()
    assert (tmp_path / "f").read_bytes() == b"2" * 20
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    Partial(tmp_path / "f", 40, 10, ORIGIN).leave()
    assert list(tmp_path.iterdir()) == []


def test_the_hash_of_chunks_in_any_order(tmp_path: Path) -> None:
    content = os.urandom(1_000_003)
    for seed in range(5):
        with (tmp_path / "f").open("w+b") as file, ThreadPoolExecutor(8) as pool:
            digest = OrderedHash(file.fileno())
            starts = list(range(0, len(content), 10_007))
            random.Random(seed).shuffle(starts)

            def bring(start: int, handle: int = file.fileno(), digest: OrderedHash = digest) -> None:
                data = bytearray(content[start : start + 10_007])
                os.pwrite(handle, data, start)
                digest.add(start, memoryview(data))

            list(pool.map(bring, starts))
            assert digest.hexdigest(len(content), memoryview(bytearray(100))) == sha256(content)
