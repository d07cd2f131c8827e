"""A corpus of files that people really have, and the exact line that each of them gets."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bench import Pairs
from toy_tokenizers import byte_level_tokenizer

from llmft_core import Conversation, InputError, Message, Problems, RowProblem, SourceOptions
from llmft_core.data.prepare import PreparedData, prepare
from llmft_core.data.sources import find_sources
from llmft_core.plan import RunPlan

# What a line is → field and reason, or nothing where the row is good.
CORPUS: list[tuple[bytes, str]] = [
    (b'{"q": "Who?", "a": "I"}', ""),
    (b"", ""),  # a blank line is no row
    (b"  \t\r", ""),
    (b'{"q": "Who?", "a": "I}', "is not valid JSON: this string has no closing quote (column 20)"),
    (b'{"q": "Who?" "a": "I"}', 'is not valid JSON: a comma is missing here, or a quote in the text before is not written \\" (column 14)'),  # noqa: E501
    (b'{"q": "Say "hi"", "a": "I"}', 'is not valid JSON: a comma is missing here, or a quote in the text before is not written \\" (column 13)'),  # noqa: E501
    (b'{"q": "Who?", "a" "I"}', "is not valid JSON: a colon is missing here (column 19)"),
    (b'{"q": "Who?", "a": }', "is not valid JSON: a value is missing here (column 20)"),
    (b"{'q': 'Who?', 'a': 'I'}", "is not valid JSON: a key in double quotes is missing here (column 2)"),
    (b'{"q": "Who?", "a": "tab\there"}', "is not valid JSON: a control character in a text must be escaped; a tab is \\t (column 24)"),  # noqa: E501
    (b'{"q": "Who?", "a": "I"},', "is not valid JSON: something follows the object (column 24)"),
    (b'{"q": "Who?", "a": "I"}{"q": "Who?", "a": "I"}', "is not valid JSON: something follows the object (column 24)"),
    (b'{"q": "Who?", "a": NaN}', "is not valid JSON: NaN is no JSON number"),
    (b"[", "is not valid JSON: a row is one line, and this one does not end in its line (column 1)"),
    (b"{", "is not valid JSON: a row is one line, and this one does not end in its line (column 1)"),
    (b"[1, 2]", "is a JSON array, not an object ({…})"),
    (b'"text"', "is a JSON string, not an object ({…})"),
    (b"null", "is a JSON null, not an object ({…})"),
    (b"true", "is a JSON boolean, not an object ({…})"),
    (b"7", "is a JSON number, not an object ({…})"),
    (b'{"a": ' + b"9" * 5000 + b"}", "is not usable JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit"),  # noqa: E501
    (b'{"q": "\xff\xfe", "a": "I"}', "is not UTF-8: byte 0xff at position 8"),
    ('{"q": "Wer?", "a": "Müller"}'.encode("latin-1"), "is not UTF-8: byte 0xfc at position 22"),
    (b'{"q": "Who?", "a": "I"}\0\0', "holds NUL bytes: the file is damaged, or not UTF-8 (column 24)"),
    (b'{"q": "Who?", "a": "\\u0000"}', "a: holds the character NUL (\\u0000)"),
    (b'{"q": ["x", {"deep": "\\u0000"}], "a": "I"}', "q[1].deep: holds the character NUL (\\u0000)"),
    (b'{"q": "\\ud83d", "a": "I"}', "q: holds half of a surrogate pair (\\ud800…)"),
    (b'{"q": {"deep": ["\\udc00"]}, "a": "I"}', "q.deep[0]: holds half of a surrogate pair (\\ud800…)"),
    (b'{"q": "1", "q": "2", "a": "I"}', "q: is given twice"),
    (b'{"q": [{"x": 1, "x": 2}], "a": "I"}', "q[0].x: is given twice"),
    (b'{"q": "Who?", "a": "I", "hint": "no"}', "hint: is no key of pairs: it knows q, a"),
    (b'{"q": "Who?", "A": "I"}', "A: is no key of pairs: it knows q, a"),
    (b'{"q": "Who?"}', "a: is missing or no text"),
    (b'{"q": "Who?", "a": 7}', "a: is missing or no text"),
    (b'{"q": "Who?", "a": null}', "a: is missing or no text"),
    (b'{"q": "Who?", "a": " \\n"}', "assistant: is trained and empty"),
    (b'{"q": "Who?", "a": "' + b"far too long " * 20 + b'"}', "is longer than --context-length 64: 268 tokens"),
    (b'{"q": "\\ud83d\\ude00", "a": "<END_A>"}', ""),  # a whole emoji; a tag as text
]  # fmt: skip


class Strict(Pairs):
    keys = ("q", "a")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    return tmp_path


def prepared(folder: Path, tokenizer: Any, context_length: int = 64, **data: Any) -> PreparedData:
    dataset = Strict(SourceOptions.model_validate({"source": "d"}))
    options = {name.replace("_", "-"): value for name, value in {"on_long": "error", **data}.items()}
    plan = RunPlan.model_validate({"context-length": context_length, "data": options})
    return prepare(dataset, find_sources(dataset, None, plan.data.mix), plan, tokenizer, "print", folder / "cache")


def good(count: int, start: int = 0) -> str:
    return "".join(json.dumps({"q": f"{n}?", "a": str(n)}) + "\n" for n in range(start, start + count))


def quarantined(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "cache" / "quarantine").iterdir()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize(("line", "message"), CORPUS)
def test_a_hostile_row_has_one_exact_line(line: bytes, message: str, folder: Path, tokenizer: Any) -> None:
    (folder / "d" / "train.jsonl").write_bytes(good(2).encode() + line + b"\n" + good(1, 2).encode())
    if not message:
        assert prepared(folder, tokenizer).report.bad_rows.total == 0
        return
    with pytest.raises(Problems) as caught:
        prepared(folder, tokenizer)
    assert str(caught.value.problems[0]) == f"d/train.jsonl:3: {message}"
    (row,) = quarantined(folder)
    assert (row["file"], row["line"]) == ("d/train.jsonl", 3)
    assert f"{row['field']}: {row['reason']}".removeprefix(": ") == message


def test_the_whole_corpus_is_set_aside_and_the_others_train(folder: Path, tokenizer: Any) -> None:
    lines = [line for line, _ in CORPUS]
    (folder / "d" / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n" + good(100).encode())
    bad = [(number, message) for number, (_, message) in enumerate(CORPUS, start=1) if message]
    usable = sum(1 for line, message in CORPUS if not message and line.strip()) + 100
    with pytest.raises(Problems) as caught:
        prepared(folder, tokenizer)
    said = str(caught.value).split("\n")
    assert said[0] == (
        f"{len(bad)} of {len(bad) + usable} rows cannot be used; mend or remove them, or set them aside with "
        "--data.on-bad-row quarantine (the first 20, then counts by reason):"
    )
    assert said[1:21] == [f"d/train.jsonl:{number}: {message}" for number, message in bad[:20]]
    assert said[21:23] == ["12 rows: is not valid JSON", "3 rows: a: is missing or no text"]
    with pytest.raises(Problems) as caught:
        prepared(folder, tokenizer, on_bad_row="quarantine")
    assert str(caught.value).split("\n")[0] == (
        f"{len(bad)} of {len(bad) + usable} train rows ({len(bad) / (len(bad) + usable):.1%}) cannot be used; "
        "--data.max-bad-rows 0.01 allows 1.0%; mend or remove them (the first 20, then counts by reason):"
    )
    assert not list((folder / "cache" / "data").glob("*/"))
    data = prepared(folder, tokenizer, on_bad_row="quarantine", max_bad_rows=0.5)
    train = data.report.splits["train"]
    assert (len(data.train), train.rows, train.bad, train.rows_read) == (usable, usable, len(bad), usable + len(bad))
    assert sum(data.report.bad_rows.counts.values()) == data.report.bad_rows.total == len(bad)
    rows = quarantined(folder)
    assert [row["line"] for row in rows] == [number for number, _ in bad]
    for row, (number, _) in zip(rows, bad, strict=True):
        raw = lines[number - 1]
        assert (row["raw"].encode() if "raw" in row else base64.b64decode(row["raw_base64"])) == raw
    assert sum("raw_base64" in row for row in rows) == 2


def test_what_was_set_aside_once_is_judged_by_each_plan(folder: Path, tokenizer: Any) -> None:
    (folder / "d" / "train.jsonl").write_text(good(50) + "no\n")
    first = prepared(folder, tokenizer, on_bad_row="quarantine", max_bad_rows=0.1)
    assert len(first.train) == 50
    again = prepared(folder, tokenizer, on_bad_row="quarantine", max_bad_rows=0.1)
    assert (again.folder, again.report) == (first.folder, first.report)
    with pytest.raises(Problems, match=r"^1 of 51 rows cannot be used; mend or remove them, or set them aside with"):
        prepared(folder, tokenizer)
    with pytest.raises(Problems, match=r"^1 of 51 train rows \(2.0%\) cannot be used; --data.max-bad-rows 0.01 allows"):
        prepared(folder, tokenizer, on_bad_row="quarantine")
    assert first.folder.is_dir()
    (folder / "d" / "train.jsonl").write_text(good(50))
    assert prepared(folder, tokenizer).report.bad_rows.total == 0


def test_nothing_is_left(folder: Path, tokenizer: Any) -> None:
    (folder / "d" / "train.jsonl").write_text("no\n" * 3)
    with pytest.raises(
        Problems, match=r"^3 of 3 train rows \(100.0%\) cannot be used; none would be left; mend or remo"
    ):
        prepared(folder, tokenizer, on_bad_row="quarantine", max_bad_rows=1)
    (folder / "d" / "train.jsonl").write_text("no\n" + good(3))
    with pytest.raises(
        InputError,
        match=r"^no train row is left: 1 of 4 cannot be used \(.*\), and 3 are longer than --context-leng",
    ):
        prepared(folder, tokenizer, 2, on_bad_row="quarantine", max_bad_rows=1, on_long="drop", max_dropped=1)


# --- warnings -----------------------------------------------------------------------------------------------------


def warnings(data: PreparedData) -> list[str]:
    return list(map(str, data.report.findings()))


def test_what_looks_wrong_is_said_and_trains(folder: Path, tokenizer: Any) -> None:
    repeated = '{"a": "0",   "q": "0?"}\n'  # the first row in another form
    (folder / "d" / "train.jsonl").write_text("\ufeff" + good(3) + repeated)
    (folder / "d" / "test.jsonl").write_text(good(2, 2))
    data = prepared(folder, tokenizer)
    expected = [
        "a byte order mark (BOM) at the beginning is skipped; save the file as UTF-8 without one: d/train.jsonl:1",
        "1 row of train repeats another: d/train.jsonl:4 = d/train.jsonl:1",
        "1 row of test is in train too: d/test.jsonl:1 = d/train.jsonl:3",
    ]
    assert warnings(data) == expected
    assert warnings(PreparedData.open(data.folder)) == expected
    # The same bytes elsewhere: the names are today's.
    (folder / "d").rename(folder / "e")
    dataset = Strict(SourceOptions.model_validate({"source": "e"}))
    plan = RunPlan.model_validate({"context-length": 64, "data": {"on-long": "error"}})
    moved = prepare(dataset, find_sources(dataset, None, plan.data.mix), plan, tokenizer, "print", folder / "cache")
    assert moved.folder == data.folder
    assert warnings(moved) == [text.replace("d/t", "e/t") for text in expected]


class Bare(Pairs):
    special_tokens = ("<START_Q>", "<END_Q>", "<NEVER>")

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        messages = (Message("assistant", str(row["a"]), True),)
        return Conversation((Message("user", str(row["q"]), False, "<START_Q>", "<END_Q>"), *messages))


def test_tokens_that_never_occur_and_rows_without_a_prompt(folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<NEVER>"], special_tokens=True)

    class NoPrompt(Bare):
        def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
            return (
                Conversation((Message("assistant", str(row["a"]), True),)) if row["q"] == "1?" else super().parse(row)
            )

    (folder / "d" / "train.jsonl").write_text(good(3))

    def said(**data: Any) -> list[str]:
        plan = RunPlan.model_validate({"data": data})
        dataset = NoPrompt(SourceOptions.model_validate({"source": "d"}))
        return warnings(
            prepare(dataset, find_sources(dataset, None, plan.data.mix), plan, tokenizer, "print", folder / "cache")
        )

    never = "the token <NEVER> never occurs in train"
    assert said() == ["1 row without a prompt: everything in it is trained: d/train.jsonl:2", never]
    assert said(**{"train-on": "all"}) == [never]
