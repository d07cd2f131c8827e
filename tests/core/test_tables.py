"""The files of a token table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmft_core import (
    EncodedExample,
    Origin,
)
from llmft_core.data.prepare import TokenTable
from llmft_core.data.tables import TableWriter, write_selection, writing

example_rows = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=9
)


def append(writer: TableWriter, example: EncodedExample, line: int, file: int = 0) -> None:
    trained = np.array(example.labels) != -100
    ids = np.array(example.input_ids, dtype=np.int32)
    writer.append_rows(ids, trained, np.array([len(ids)]), np.array([line], dtype=np.int32), np.array([file]))


@given(example_rows)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[list[tuple[int, bool]]]) -> None:
    folder = tmp_path_factory.mktemp("table") / "t"
    with writing(folder) as writer:
        for number, row in enumerate(rows):
            ids = tuple(token for token, _ in row)
            append(writer, EncodedExample(ids, tuple(t if trained else -100 for t, trained in row)), 3 * number + 1)
    table = TokenTable(folder, ["file"])
    assert len(table) == len(rows)
    for number, row in enumerate(rows):
        ids, labels = table.row(number)
        assert ids.dtype == np.int32
        assert labels.dtype == np.int64
        assert ids.tolist() == [token for token, _ in row]
        assert labels.tolist() == [token if trained else -100 for token, trained in row]
        assert table.length(number) == len(row)
        assert table.trained_tokens(number) == sum(trained for _, trained in row[1:])
        assert table.origin(number) == Origin("file", 3 * number + 1)
    assert table.total_tokens == sum(map(len, rows))
    assert table.total_trained_tokens == sum(table.trained_tokens(number) for number in range(len(table)))
    assert table.longest == max(map(len, rows))
    assert table.ends_trained == sum(row[-1][1] for row in rows) / len(rows)


def test_a_table_is_read_only_and_knows_its_end(tmp_path: Path) -> None:
    with writing(tmp_path / "t") as writer:
        append(writer, EncodedExample((1, 2), (-100, 2)), 1)
        assert writer.rows == 1
    table = TokenTable(tmp_path / "t")
    with pytest.raises(ValueError, match="read-only"):
        table.row(0)[0][0] = 7
    for index in (1, -1):
        with pytest.raises(IndexError, match="of a table of 1 rows"):
            table.row(index)


def test_a_selection(tmp_path: Path) -> None:
    with writing(tmp_path / "all") as writer:
        for number in range(5):
            append(writer, EncodedExample((number,) * (number + 1), (number,) * (number + 1)), number + 1)
    write_selection(TokenTable(tmp_path / "all"), np.array([3, 1]), tmp_path / "some")
    some = TokenTable(tmp_path / "some")
    assert [some.row(row)[0].tolist() for row in range(2)] == [[3] * 4, [1] * 2]
    assert some.lines.tolist() == [4, 2]
