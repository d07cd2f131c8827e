"""`llmft dataset create`: another format's rows as files of chat-tags, which say the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import with_tags

from llmft_core import Conversation, DatasetFormat, InputError, Message, Problems, Role, RowProblem, SourceOptions
from llmft_core.catalog import Catalog
from llmft_core.cli.dataset import run_command
from llmft_core.data.create import create
from llmft_core.data.formats import open_dataset
from llmft_core.data.prepare import PreparedData, prepare
from llmft_core.data.sources import find_sources
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan

CATALOG = Catalog(load_plugins())


class Pairs(DatasetFormat):
    """With a closing tag that both roles share, so that names alone do not tell what belongs together."""

    name = "pairs"
    summary = "a question and an answer"
    options_type = SourceOptions
    special_tokens = ("<U>", "<E>", "<B>")
    roles = (Role("asks", "<U>", "<E>"), Role("tells", "<B>", "<E>", trained=True))

    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        if set(row) != {"q", "a"}:
            return RowProblem("q", "is missing")
        asks, tells = Message("asks", row["q"], False, "<U>", "<E>"), Message("tells", row["a"], True, "<B>", "<E>")
        return Conversation((asks, tells))


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def pairs(folder: Path, *rows: dict[str, str], dataset: type[DatasetFormat] = Pairs) -> Any:
    """(format, sources) with these training rows."""
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = dataset(SourceOptions(source=str(folder)))
    return made, find_sources(made, None)


def opened(**choice: Any) -> Any:
    return open_dataset(CATALOG, RunPlan.model_validate({"dataset": choice}), None)


def prepared(tokenizer: Any, cache: Path, **choice: Any) -> PreparedData:
    dataset, sources = opened(**choice)
    return prepare(dataset, sources, RunPlan.model_validate({"context-length": 2048}), tokenizer, "print", cache)


def test_gsm8k_token_for_token(
    gsm8k_folder: Path, llama2_tokenizer_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows, the real data and the real tokenizer."""
    family = pytest.importorskip("llmft_plugins.models.llama2")
    out = tmp_path / "data"
    assert run_command(["create", "gsm8k", "--dataset.source", str(gsm8k_folder), "--out", str(out)], {}, tmp_path) == 0
    assert capsys.readouterr().out == (
        f"{out}/train.jsonl: 7,473 rows\n{out}/test.jsonl: 1,319 rows\n{out}/tokens.json: 4 tokens\n"
        f"train on them:  llmft run --dataset chat-tags --dataset.source {out}\n"
    )
    assert sorted(path.name for path in out.iterdir()) == ["test.jsonl", "tokens.json", "train.jsonl"]
    assert json.loads((out / "tokens.json").read_text()) == {"tokens": ["<START_Q>", "<END_Q>", "<START_A>", "<END_A>"]}
    first = json.loads((gsm8k_folder / "train.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert rows_of(out / "train.jsonl")[0] == {
        "input": f"<START_Q>{first['question']}<END_Q><START_A>{first['answer']}<END_A>"
    }
    tokenizer = with_tags(family.from_sentencepiece(llama2_tokenizer_model))
    ours = prepared(tokenizer, tmp_path / "cache", name="chat-tags", source=str(out))
    theirs = prepared(tokenizer, tmp_path / "cache", name="gsm8k", source=str(gsm8k_folder))
    assert ours.digest != theirs.digest
    assert len(ours.train) == 7473
    assert ours.test is not None
    assert len(ours.test) == 1319
    assert ours.report.content_digest == theirs.report.content_digest


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    dataset, sources = pairs(tmp_path / "in", {"q": "a", "a": "b"})
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokens.json").write_text("mine")
    with pytest.raises(InputError, match=rf"--out: {out}/tokens.json exists: .*nothing is overwritten"):
        create(dataset, sources, CATALOG, out)
    assert [path.name for path in out.iterdir()] == ["tokens.json"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    dataset, sources = pairs(tmp_path / "in", {"q": "a", "a": "b"})
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=rf"^--out: cannot write to {tmp_path}/out: File exists; name another folder$"):
        create(dataset, sources, CATALOG, tmp_path / "out")


def test_pairs_are_named_where_their_names_do_not_tell(tmp_path: Path) -> None:
    dataset, sources = pairs(tmp_path / "in", {"q": "a", "a": "b"})
    created = create(dataset, sources, CATALOG, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokens.json").read_text()) == {
        "tokens": ["<U>", "<E>", "<B>"],
        "roles": {"asks": ["<U>", "<E>"], "tells": ["<B>", "<E>"]},
    }
    assert created.flags == ["--data.train-on tells"]
    reader, _ = open_dataset(
        CATALOG,
        RunPlan.model_validate(
            {"dataset": {"name": "chat-tags", "source": str(tmp_path / "out")}, "data": {"train-on": "tells"}}
        ),
        None,
    )
    assert reader.special_tokens == ("<U>", "<E>", "<B>")


def test_flags_that_the_rows_need(tmp_path: Path) -> None:
    class Loose(Pairs):
        def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
            found = super().parse(row)
            assert isinstance(found, Conversation)
            return Conversation((Message("note", "Note.", False), *found.messages))

    dataset, sources = pairs(tmp_path / "in", {"q": "a <X>", "a": "b"}, dataset=Loose)
    created = create(dataset, sources, CATALOG, tmp_path / "out")
    assert created.flags == ["--dataset.outside context", "--dataset.unknown-tags text", "--data.train-on tells"]


def test_rows_that_cannot_be_written_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "b"}, {"q": "a<E>", "a": "b"}, {"x": "y"}, {"q": "", "a": "b"}]
    dataset, sources = pairs(tmp_path / "in", *rows)
    with pytest.raises(Problems) as caught:
        create(dataset, sources, CATALOG, tmp_path / "out")
    where = f"{tmp_path}/in/train.jsonl"
    assert str(caught.value).split("\n") == [
        "rows that cannot be written with tags: 3:",
        f"{where}:2: asks: holds <E> as text, which would be read as a tag",
        f"{where}:3: q: is missing",
        f"{where}:4: would be read as another row (has an empty span: <U> at character 1 holds no text)",
    ]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_format_without_tags_is_refused(tmp_path: Path) -> None:
    class Bare(Pairs):
        roles = (Role("asks"), Role("tells", trained=True))

    class OneSided(Pairs):
        roles = (Role("asks", "<U>"), Role("tells", "<B>", "<E>", trained=True))

    for dataset, reason in (
        (Bare, "the rows of pairs have no tags of their own, which chat-tags is made of"),
        (OneSided, "pairs writes <U> around the role asks on one side only; chat-tags needs an opening and a closing"),
    ):
        made, sources = pairs(tmp_path / "in", {"q": "a", "a": "b"}, dataset=dataset)
        with pytest.raises(InputError, match=reason):
            create(made, sources, CATALOG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["create"], "no folder is given to write to: `llmft dataset create gsm8k --out data`"),
        (["create", "gsm9k", "--out", "x"], "no dataset is called gsm9k (did you mean gsm8k?)"),
        (["make"], "no action is called make"),
        ([], "no action is given"),
    ],
)
def test_wrong_words(argv: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run_command(argv, {}, tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_round_trip_with_any_text(tmp_path: Path) -> None:
    """Written with tags and read again, every row is the row it was; those that could not be are refused."""
    pieces = st.sampled_from(["<START_Q>", "<END_A>", "</USR>", "<", "\n", "\u2028", '"', "\\", "é😀", " "])
    texts = st.lists(pieces | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=5).map("".join)
    gsm8k = CATALOG.create("dataset", {"name": "gsm8k"})

    @settings(deadline=None)
    @given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
    def check(rows: list[tuple[str, str]]) -> None:
        out = tmp_path / "out"
        for old in out.glob("*"):
            old.unlink()
        given_rows = [{"question": question, "answer": answer} for question, answer in rows]
        source = tmp_path / "in"
        pairs(source, *given_rows)
        dataset, sources = opened(name="gsm8k", source=str(source))
        hostile = [
            row
            for row in given_rows
            for text in row.values()
            if not text.strip() or "\0" in text or any(tag in text for tag in dataset.special_tokens)
        ]
        if hostile:
            with pytest.raises(Problems):
                create(dataset, sources, CATALOG, out)
            return
        flags = create(dataset, sources, CATALOG, out).flags
        assert flags in ([], ["--dataset.unknown-tags text"])
        unknown = "text" if flags else "error"
        reader, _ = opened(**{"name": "chat-tags", "source": str(out), "unknown-tags": unknown})
        for before, after in zip(given_rows, rows_of(out / "train.jsonl"), strict=True):
            meant, read = gsm8k.parse(before), reader.parse(after)
            assert [(m.opening, m.text, m.closing, m.trained) for m in read.messages] == [
                (m.opening, m.text, m.closing, m.trained) for m in meant.messages
            ]

    check()
