"""Files as blocks of rows: numbers as editors count them, compression, damage, memory."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from llmft_core.data.blocks import Block, LinesBlock, TableBlock, cut_lines
from llmft_core.data.files import FileSource, zstd_module
from llmft_core.data.rows import Row
from llmft_core.errors import InputError
from llmft_core.values import RowProblem

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstd_module().compress,
}


class Dribble(io.RawIOBase):
    """A file that returns a few bytes at a time, as pipes and stores may."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        super().__init__()
        self._rest, self._sizes = data, sizes

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        size = self._sizes.pop() if self._sizes else 7
        found, self._rest = self._rest[:size], self._rest[size:]
        return found


def file_of(path: Path) -> FileSource:
    return FileSource(str(path), str(path), "--dataset.train", None)


def rows_of(path: Path) -> list[tuple[int, Row]]:
    source = file_of(path)
    return [row for block in source.blocks(0, source.digest()) for row in block.rows()]


def refused(path: Path, digest: str = "") -> str:
    with pytest.raises(InputError) as caught:
        list(file_of(path).blocks(0, digest))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


# --- lines --------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=9))
def test_any_bytes_are_lines_as_they_are_counted_elsewhere(data: bytes, sizes: list[int]) -> None:
    blocks = list(cut_lines(3, cast(IO[bytes], Dribble(data, sizes))))
    assert b"".join(block.data for block in blocks) == data
    assert all(block.file == 3 for block in blocks)
    first = 1
    for block in blocks:
        assert block.first == first
        assert block.data.endswith(b"\n") or block is blocks[-1]
        first += block.count
    assert first - 1 == data.count(b"\n") + bool(data and not data.endswith(b"\n"))
    lines = data.split(b"\n")
    read = {number: (row, block) for block in blocks for number, row in block.rows()}
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        assert (number in read) == bool(text.strip())
        if number in read:
            row, block = read[number]
            assert isinstance(row, dict | RowProblem)
            assert block.raw(number) == line


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), max_size=20), st.integers(1, 50))
def test_rows_are_read_back_whatever_the_blocks(rows: list[dict[str, int]], size: int) -> None:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode("utf-8", "replace")
    expected = [(number, json.loads(line)) for number, line in enumerate(data.split(b"\r\n")[:-1], start=1)]
    found = [row for block in cut_lines(0, cast(IO[bytes], Dribble(data, [size] * 40))) for row in block.rows()]
    assert [(number, row) for number, row in found if isinstance(row, dict)] == [
        (number, row) for number, row in expected if not any("\0" in key for key in row)
    ]


def test_a_block_is_about_a_mebibyte_of_whole_lines_and_pickles(tmp_path: Path) -> None:
    line = json.dumps({"a": "x" * 990}) + "\n"
    (tmp_path / "t.jsonl").write_text(line * 5000)
    blocks = list(file_of(tmp_path / "t.jsonl").blocks(2))
    assert len(blocks) == 5
    assert sum(block.count for block in blocks) == 5000
    assert all(isinstance(block, LinesBlock) and len(block.data) <= 2 << 20 for block in blocks)
    again = pickle.loads(pickle.dumps(blocks[1]))
    assert again == blocks[1]
    assert list(again.rows()) == list(blocks[1].rows())


def test_the_byte_order_mark_is_skipped_and_told(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    (block,) = file_of(tmp_path / "t.jsonl").blocks(0)
    assert block.bom
    assert list(block.rows()) == [(1, {"a": 1}), (2, {"a": 2})]
    assert block.raw(1) == b'\xef\xbb\xbf{"a": 1}'


def test_a_file_without_line_ends_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    with (tmp_path / "t.jsonl").open("wb") as file:
        file.write(b'{"a": 1}\n')
        file.truncate(80 << 20)
    assert refused(tmp_path / "t.jsonl") == (
        "--dataset.train: t.jsonl:2: this line is longer than 64 MiB; a .jsonl file has one row a line"
    )


# --- compression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_lines_are_the_same_rows(suffix: str, tmp_path: Path) -> None:
    text = b'{"a": 1}\n\n{"a": 3}\nno\n{"a": 5}'
    path = tmp_path / f"t{suffix}"
    path.write_bytes(PACK[suffix](text))
    assert rows_of(path) == [
        (1, {"a": 1}),
        (3, {"a": 3}),
        (4, RowProblem("", "is not valid JSON: a value is missing here (column 1)")),
        (5, {"a": 5}),
    ]
    # Parts that were compressed one by one and joined are one file, as for gzip and zstd themselves.
    path.write_bytes(PACK[suffix](text[:12]) + PACK[suffix](text[12:]))
    assert [number for number, _ in rows_of(path)] == [1, 3, 4, 5]
    path.write_bytes(PACK[suffix](b""))
    assert rows_of(path) == []


@pytest.mark.parametrize(
    ("suffix", "kind", "reason"),
    [
        (".jsonl.gz", "gzip", "Not a gzipped file (b'{\"')"),
        (".jsonl.zst", "zstd", "Unable to decompress Zstandard data: Unknown frame descriptor"),
    ],
)
def test_damage_is_one_line_with_the_file(suffix: str, kind: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    whole = PACK[suffix](b"".join(b'{"a": %d}\n' % number for number in range(5000)))
    for size in (len(whole) - 1, len(whole) // 2, 6):
        path.write_bytes(whole[:size])
        assert refused(path) == f"--dataset.train: t{suffix} is cut off: its {kind} data has no end; fetch it again"
    path.write_bytes(b'{"a": 1}\n')
    assert refused(path) == f"--dataset.train: t{suffix} is no whole {kind} file: {reason}; fetch it again"
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 40]) + whole[middle + 40 :])
    assert refused(path).startswith(f"--dataset.train: t{suffix} is no whole {kind} file: ")
    path.write_bytes(whole + b"more")
    assert refused(path).startswith(f"--dataset.train: t{suffix} is ")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_large_file_is_read_in_little_memory(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    text = (json.dumps({"a": "x" * 1000}) + "\n") * 100_000  # 101 MB
    path.write_bytes(PACK[suffix](text.encode()))
    del text
    tracemalloc.start()
    rows = sum(block.count for block in file_of(path).blocks(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 100_000
    assert peak < 16 << 20


@pytest.mark.parametrize("suffix", PACK)
def test_the_digest_is_that_of_the_bytes_as_they_lie(suffix: str, tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / f"t{suffix}"
    path.write_bytes(PACK[suffix](b'{"a": 1}\n'))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert file_of(path).digest() == digest
    assert len(list(file_of(path).blocks(0, digest))) == 1
    path.write_bytes(PACK[suffix](b'{"a": 2}\n'))
    assert refused(path, digest) == f"--dataset.train: t{suffix} was changed while it was read; try again"


# --- tables -------------------------------------------------------------------------------------------------------


def write(path: Path, columns: dict[str, Any]) -> None:
    parquet.write_table(pa.table(columns), path)


def blocks_of(path: Path) -> list[Block]:
    return list(file_of(path).blocks(0, file_of(path).digest()))


def test_a_table_comes_in_blocks(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", {"n": list(range(3000)), "s": ["x" * 5000] * 3000})
    blocks = blocks_of(tmp_path / "t.parquet")
    assert len(blocks) > 10
    assert all(isinstance(block, TableBlock) and len(block.data) < 2 << 20 for block in blocks)
    again: list[Block] = pickle.loads(pickle.dumps(blocks))
    rows = [row for block in again for row in block.rows()]
    assert [number for number, _ in rows] == list(range(1, 3001))
    assert [row["n"] for _, row in rows if isinstance(row, dict)] == list(range(3000))
    assert json.loads(blocks[1].raw(blocks[1].first)) == {"n": blocks[0].count, "s": "x" * 5000}


def test_rows_of_a_table_that_cannot_be_used(tmp_path: Path) -> None:
    broken = pa.array([b"ok", b"\xff", b"fine"], pa.binary()).view(pa.string())
    write(tmp_path / "t.parquet", {"n": [1, 2, 3], "s": broken, "m": [["a"], ["b"], ["c", "\0"]]})
    (block,) = blocks_of(tmp_path / "t.parquet")
    assert list(block.rows()) == [
        (1, {"n": 1, "s": "ok", "m": ["a"]}),
        (2, RowProblem("s", "is not UTF-8: byte 0xff at position 1")),
        (3, RowProblem("m[1]", "holds the character NUL (\\u0000)")),
    ]


def test_a_table_with_a_column_twice(tmp_path: Path) -> None:
    table = pa.table([[1], [2]], names=["n", "n"])
    parquet.write_table(table, tmp_path / "t.parquet")
    assert refused(tmp_path / "t.parquet") == "--dataset.train: cannot read t.parquet: it has two columns called n"


def test_a_table_that_is_cut_off_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write(path, {"n": [1, 2, 3]})
    digest = file_of(path).digest()
    whole = path.read_bytes()
    write(path, {"n": [1, 2, 4]})
    assert refused(path, digest) == "--dataset.train: t.parquet was changed while it was read; try again"
    path.write_bytes(whole[:-20])
    assert refused(path).startswith("--dataset.train: cannot read t.parquet: ")


def test_made_up_rows_come_in_blocks(tmp_path: Path) -> None:
    from llmft_core.data.blocks import cut_made

    def made() -> Iterator[dict[str, Any]]:
        return ({"n": number, "s": "\0" if number == 7 else "s"} for number in range(2500))

    blocks = list(cut_made(1, made()))
    assert [(block.first, block.count) for block in blocks] == [(1, 1024), (1025, 1024), (2049, 452)]
    rows = dict(row for block in blocks for row in block.rows())
    assert rows[8] == RowProblem("s", "holds the character NUL (\\u0000)")
    assert rows[2500] == {"n": 2499, "s": "s"}
    assert blocks[2].raw(2500) == b'{"n": 2499, "s": "s"}'
