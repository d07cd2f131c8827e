"""Files, folders, URIs and generators → rows with their lines."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_rows import Plain, rows_of, write_parquet

from llmft_core import InputError, Options, RowProblem, SourceOptions, Split
from llmft_core.catalog import Catalog
from llmft_core.data.blocks import cut_lines
from llmft_core.data.rows import Row, parse_json_row
from llmft_core.data.sources import SplitSource, find_sources
from llmft_core.loading import load_plugins
from llmft_core.storage.places import Places


class Made(Plain):
    options_type = Options

    def generate(self, split: Split) -> Iterator[dict[str, Any]] | None:
        return iter([{"n": 1}, {"n": 2}]) if split == "train" else None


def plain(**options: Any) -> Plain:
    return Plain(SourceOptions.model_validate(options))


def jsonl_rows(file: io.BytesIO) -> Iterator[tuple[int, Row]]:
    for block in cut_lines(0, file):
        yield from block.rows()


# --- lines --------------------------------------------------------------------------------------------------------


def test_lines_are_counted_as_an_editor_counts_them() -> None:
    file = io.BytesIO(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "\xe2\x80\xa8 \\u2028"}\n{"a": 3}')
    assert list(jsonl_rows(file)) == [(1, {"a": 1}), (4, {"a": "\u2028 \u2028"}), (5, {"a": 3})]


@given(
    st.lists(st.one_of(st.just(b""), st.just(b'{"k": 1}'), st.binary(max_size=20).map(lambda b: b.replace(b"\n", b""))))
)
def test_every_line_is_a_row_a_problem_or_blank(lines: list[bytes]) -> None:
    found = dict(jsonl_rows(io.BytesIO(b"\n".join(lines))))
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        assert (number in found) == bool(text.strip())
    assert all(isinstance(row, dict | RowProblem) for row in found.values())


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.dictionaries(texts, st.recursive(st.integers() | texts | st.none(), st.lists, max_leaves=5)))
def test_whatever_json_writes_is_read_back(row: dict[str, Any]) -> None:
    assert parse_json_row(json.dumps(row).encode()) == row
    assert parse_json_row(json.dumps(row, ensure_ascii=False).encode()) == row


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (b'{"question": "How many?', "", "this string has no closing quote (column 14)"),
        (b'{"a": 1, "a": 2}', "a", "given twice"),
        (b'{"a": {"b": 1, "b": 2}}', "a.b", "given twice"),
        (b'{"a": "\xff"}', "", "not UTF-8: byte 0xff at position 8"),
        (b"[1]", "", "is a JSON array, not an object"),
        (b'"text"', "", "is a JSON string"),
        (b"null", "", "is a JSON null"),
        (b"true", "", "is a JSON boolean"),
        (b"1.5", "", "is a JSON number"),
        (b'{"a": NaN}', "", "NaN is no JSON number"),
        (b'{"ok": "\\ud83d\\ude00", "a": "\\ud83d"}', "a", "half of a surrogate pair"),
        (b"[" * 100_000, "", "not usable JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "", "not usable JSON"),
    ],
)
def test_what_is_wrong_with_a_line(line: bytes, field: str, reason: str) -> None:
    problem = parse_json_row(line)
    assert isinstance(problem, RowProblem)
    assert problem.field == field
    assert reason in problem.reason
    assert "\n" not in problem.reason


def test_a_whole_emoji_in_escapes_is_text() -> None:
    assert parse_json_row(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_lines_longer_than_a_block(tmp_path: Path) -> None:
    long = "x" * (3 << 20)
    (tmp_path / "train.jsonl").write_text(json.dumps({"a": long}) + "\n" + json.dumps({"a": 1}) + "\n")
    rows = rows_of(find_sources(plain(source=str(tmp_path)), None)["train"])
    assert [row for _, row in rows] == [{"a": long}, {"a": 1}]


# --- finding ------------------------------------------------------------------------------------------------------


def test_a_folder_with_both_splits(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    write_parquet(tmp_path / "test.parquet", [{"a": 2}, {"a": 3}])
    sources = find_sources(plain(source=str(tmp_path)), None)
    assert rows_of(sources["train"]) == [(f"{tmp_path}/train.jsonl:1", {"a": 1})]
    assert rows_of(sources["test"]) == [
        (f"{tmp_path}/test.parquet:1", {"a": 2}),
        (f"{tmp_path}/test.parquet:2", {"a": 3}),
    ]


def test_single_files(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "held.jsonl").write_text('{"a": 2}\n')
    assert list(find_sources(plain(train=str(tmp_path / "mine.jsonl")), None)) == ["train"]
    both = find_sources(plain(train=str(tmp_path / "mine.jsonl"), test=str(tmp_path / "held.jsonl")), None)
    assert rows_of(both["test"]) == [(f"{tmp_path}/held.jsonl:1", {"a": 2})]


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("openai/gsm8k").mkdir(parents=True)
    Path("openai/gsm8k/train.jsonl").write_text("{}\n")
    (train,) = find_sources(plain(source="openai/gsm8k"), None).values()
    assert rows_of(train) == [("openai/gsm8k/train.jsonl:1", {})]


def test_uris_are_read_through_storage(tmp_path: Path) -> None:
    places = local_places()
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    write_parquet(tmp_path / "test.parquet", [{"a": 3}])
    uri = f"file://{tmp_path}"
    sources = find_sources(plain(source=uri), places)
    assert rows_of(sources["train"]) == [(f"{uri}/train.jsonl:1", {"a": 1}), (f"{uri}/train.jsonl:3", {"a": 2})]
    assert rows_of(sources["test"]) == [(f"{uri}/test.parquet:1", {"a": 3})]
    with pytest.raises(InputError, match=r"--dataset.train: there is no file file:///"):
        find_sources(plain(train=f"{uri}/nothing.jsonl"), places)


# --- shards, globs, several sources ------------------------------------------------------------------------------


def files_of(source: SplitSource) -> list[str]:
    return [file.name for file in source.files]


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`a/` with shards of both splits, `b/` with rows of no split's name, `c.jsonl`."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/train-00000-of-00002.jsonl", "a/train-00001-of-00002.jsonl", "a/test_1.jsonl", "a/trainer.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"f": name}) + "\n")
    for name in ("b/one.jsonl", "b/two.jsonl", "b/.hidden.jsonl", "b/notes.txt", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"f": name}) + "\n" * 2)
    return tmp_path


def test_shards_in_a_folder(shards: Path) -> None:
    sources = find_sources(plain(source="a"), None)
    assert files_of(sources["train"]) == ["a/train-00000-of-00002.jsonl", "a/train-00001-of-00002.jsonl"]
    assert files_of(sources["test"]) == ["a/test_1.jsonl"]
    assert sources["train"].name == "a (2 files)"
    assert sources["test"].name == "a/test_1.jsonl"
    assert rows_of(sources["train"]) == [
        (f"a/train-0000{number}-of-00002.jsonl:1", {"f": f"a/train-0000{number}-of-00002.jsonl"}) for number in (0, 1)
    ]
    blocks = list(sources["train"].blocks(sources["train"].digest()))
    assert [block.file for block in blocks] == [0, 1]


@pytest.mark.parametrize(
    ("given", "files"),
    [
        ("b/*.jsonl", ["b/one.jsonl", "b/two.jsonl"]),
        ("?/t*wo.jsonl", ["b/two.jsonl"]),
        ("**/o[!a]e.jsonl", ["b/one.jsonl"]),
        ("c.jsonl,b/two.jsonl", ["c.jsonl", "b/two.jsonl"]),
        (["c.jsonl", "b/two.jsonl, b/one.jsonl"], ["c.jsonl", "b/two.jsonl", "b/one.jsonl"]),
        ("a", ["a/train-00000-of-00002.jsonl", "a/train-00001-of-00002.jsonl"]),
        ("a/*-of-*,c.jsonl", ["a/train-00000-of-00002.jsonl", "a/train-00001-of-00002.jsonl", "c.jsonl"]),
    ],
)
@pytest.mark.parametrize("uri", [False, True])
def test_what_is_given_is_one_list_of_files(given: Any, files: list[str], uri: bool, shards: Path) -> None:
    base = f"file://{shards}/" if uri else ""
    given = [item.strip() for item in (given.split(",") if isinstance(given, str) else given)]
    given = [", ".join(base + part.strip() for part in item.split(",")) for item in given]
    source = find_sources(plain(train=given), local_places() if uri else None)["train"]
    assert files_of(source) == [base + file for file in files]
    assert source.weights == (1.0,) * len(files)
    assert [row["f"] for _, row in rows_of(source)] == files


def test_all_files_of_a_folder_whose_names_say_nothing(shards: Path) -> None:
    sources = find_sources(plain(train="b", test="a"), None)
    assert files_of(sources["train"]) == ["b/one.jsonl", "b/two.jsonl"]
    assert files_of(sources["test"]) == ["a/test_1.jsonl"]


def test_a_mix_weighs_the_sources_as_they_are_given(shards: Path) -> None:
    sources = find_sources(plain(train="b/*.jsonl,c.jsonl", test="a"), None, (0.5, 3))
    assert sources["train"].weights == (0.5, 0.5, 3)
    assert sources["test"].weights == (1.0,)
    assert find_sources(plain(source="a"), None, (2,))["train"].weights == (2, 2)
    with pytest.raises(InputError) as caught:
        find_sources(plain(train="b/*.jsonl,c.jsonl"), None, (1, 2, 3))
    assert str(caught.value) == (
        "--data.mix has 3 weights for the training sources b/*.jsonl, c.jsonl: give one for each, in their order"
    )


def test_the_digest_of_several_files_is_of_all_of_them(shards: Path) -> None:
    def digest(given: str) -> str:
        return find_sources(plain(train=given), None)["train"].digest()

    assert len({digest("b/one.jsonl"), digest("b/one.jsonl,c.jsonl"), digest("c.jsonl,b/one.jsonl")}) == 3
    source = find_sources(plain(train="b/one.jsonl,c.jsonl"), None)["train"]
    before = source.digest()
    (shards / "c.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"--dataset.train: b/one.jsonl, c.jsonl \(2 files\) was changed while it was"):
        list(source.blocks(before))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
         "f: train-00001-of-00003 is missing (2 of 3 are there)"),
        (["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"],
         "f has train-00000-of-00001 and train-00000-of-00002, which are not shards of one set: choose with "
         "--dataset.train FILE, or a pattern for several"),
        (["train.jsonl", "train_old.jsonl"],
         "f has train.jsonl and train_old.jsonl: choose with --dataset.train FILE, or a pattern for several"),
        (["train.1.jsonl", "train.2.jsonl.gz"],
         "f has train.1.jsonl and train.2.jsonl.gz: choose with --dataset.train FILE, or a pattern for several"),
    ],
)  # fmt: skip
def test_files_of_which_it_is_not_plain_what_they_are(
    names: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in names:
        Path("f").mkdir(exist_ok=True)
        Path("f", name).write_text("{}\n")
    with pytest.raises(InputError) as caught:
        find_sources(plain(source="f"), None)
    assert str(caught.value) == f"--dataset.source: {message}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "b/*",
            "b/* matches b/notes.txt, which is no .jsonl, .jsonl.gz, .jsonl.zst or .parquet file: write a narrower",
        ),
        ("b/x*.jsonl", "no file matches b/x*.jsonl"),
        ("c.jsonl,./c.jsonl", "./c.jsonl is given twice: --data.mix says how often an epoch passes over it"),
        ("c.jsonl,*.jsonl", "c.jsonl is given twice"),
        ("d", "there is no file d"),
        ("e", "e is no file with rows and no folder with train rows (.jsonl, .jsonl.gz, .jsonl.zst or .parquet)"),
        ("hf://datasets/x", "hf://datasets/x: write hf://datasets/OWNER/NAME/PATH-OF-A-FILE"),
    ],
)
def test_what_cannot_be_given(given: str, message: str, shards: Path) -> None:
    (shards / "e").mkdir()
    with pytest.raises(InputError) as caught:
        find_sources(plain(train=given), None)
    assert f"--dataset.train: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_small_file_beside_the_rows(shards: Path) -> None:
    assert find_sources(plain(source="a"), None)["train"].companion("tokens.json") is None
    (shards / "a" / "tokens.json").write_text("[1]")
    assert find_sources(plain(source="a"), None)["train"].companion("tokens.json") == b"[1]"
    both = find_sources(plain(train=f"c.jsonl,file://{shards}/a"), local_places())["train"]
    assert both.companion("tokens.json") == b"[1]"
    (shards / "tokens.json").write_text("[2]")
    with pytest.raises(InputError, match=rf"--dataset.train: the tokens.json of . and file://{shards}/a differ: make"):
        both.companion("tokens.json")
    assert find_sources(Made(Options()), None)["train"].companion("tokens.json") is None


def local_places() -> Places:
    catalog = Catalog(load_plugins())
    if "local" not in catalog.names("storage"):
        pytest.skip("needs the local storage backend")
    return Places(catalog, None, {})


def test_generated_rows() -> None:
    sources = find_sources(Made(Options()), None)
    assert list(sources) == ["train"]
    assert rows_of(sources["train"]) == [("plain:train:1", {"n": 1}), ("plain:train:2", {"n": 2})]
    assert len(sources["train"].digest()) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "dataset plain has no rows of its own: give them with --dataset.source FOLDER"),
        ({"source": "nowhere"}, "--dataset.source: there is no folder nowhere, and it is no URI and no hub id"),
        ({"source": "./no/where"}, "there is no folder ./no/where"),
        (
            {"source": "empty"},
            "empty has no train.jsonl, no train.jsonl.gz, no train.jsonl.zst, no train.parquet and no shards of one",
        ),
        ({"source": "double"}, "double has train.jsonl and train.parquet: choose with --dataset.train FILE"),
        (
            {"source": "rows.jsonl"},
            "rows.jsonl is a file: give the folder it lies in, or the file with --dataset.train",
        ),
        ({"train": "no.jsonl"}, "--dataset.train: there is no file no.jsonl"),
        ({"train": "rows.csv"}, "use a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file"),
        ({"test": "rows.jsonl"}, "add --dataset.train FILE"),
        ({"train": "rows.jsonl", "source": "empty"}, "not both"),
        ({"train": "rows.jsonl", "test": "no.jsonl"}, "--dataset.test: there is no file no.jsonl"),
        ({"source": "nobody/nothing"}, "HF_HUB_OFFLINE is set; give your own copy with --dataset.source FOLDER"),
    ],
)
def test_errors_name_the_flag(
    options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("double").mkdir()
    for name in ("double/train.jsonl", "double/train.parquet", "rows.jsonl", "rows.csv"):
        Path(name).write_text("{}\n")
    with pytest.raises(InputError) as caught:
        find_sources(plain(**options), None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_parquet_and_what_changes_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("no table")
    with pytest.raises(InputError, match=r"--dataset.source: cannot read .*train.parquet: "):
        rows_of(find_sources(plain(source=str(tmp_path)), None)["train"])
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    source = find_sources(plain(train=str(tmp_path / "rows.jsonl")), None)["train"]
    with pytest.raises(InputError, match=r"--dataset.train: .*rows.jsonl was changed while it was read; try again"):
        list(source.rows("0" * 64))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"--dataset.train: cannot read .*: No such file"):
        source.digest()
