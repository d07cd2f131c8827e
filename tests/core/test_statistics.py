"""Figures about a dataset: right, before rows are dropped, in words, as JSON and as pictures."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import ListTable, random_table
from toy_tokenizers import metaspace_tokenizer

from llmft_core import Placement
from llmft_core.cli.main import main
from llmft_core.data.order import Mix, Order, packed_rows
from llmft_core.data.statistics import context_fit, histogram, percentiles, vocabulary
from llmft_core.data.steps import first_epoch
from llmft_core.plan import RunPlan
from llmft_core.report.histogram import bins, histogram_lines, histogram_svg

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=60).map(lambda values: np.array(values, dtype=np.int64))
SVG = "{http://www.w3.org/2000/svg}"


# --- the figures --------------------------------------------------------------------------------------------------


@given(lengths)
def test_percentiles_are_values_that_occur(values: Any) -> None:
    found = percentiles(values)
    wanted = np.percentile(values, [0, 5, 25, 50, 75, 90, 95, 99, 100], method="inverted_cdf")
    assert [found.least, found.p5, found.p25, found.median, found.p75, found.p90, found.p95, found.p99, found.most] == (
        wanted.tolist()
    )
    assert found.mean == values.mean()


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_every_row_is_in_its_bin(values: list[int]) -> None:
    made = histogram(np.array(values, dtype=np.int64))
    assert len(made.counts) <= 40
    assert sum(made.counts) == len(values)
    assert made.counts[0] > 0
    assert made.counts[-1] > 0
    for begin, end, count in bins(made):
        assert count == sum(begin <= value <= end for value in values)


def best_fit_decreasing(values: list[int], context: int) -> int:
    """One by one, as the books say."""
    rooms: list[int] = []
    for length in sorted(values, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(context - length)
    return len(rooms)


@given(lengths, st.integers(60, 130))
def test_packing_by_histogram_is_best_fit_decreasing(values: Any, context: int) -> None:
    assert packed_rows(values, context) == best_fit_decreasing(values.tolist(), context)


@pytest.mark.parametrize("packing", ["none", "best-fit"])
def test_padding_is_that_of_a_run(packing: str) -> None:
    plan = RunPlan.model_validate({"context-length": 90, "global-batch": 10, "seed": 3, "data": {"packing": packing}})
    order = Order.of(random_table(150, 50, 90), plan)
    run = first_epoch(order, plan, Placement(1, "cpu", "fp32", 5, 2, 1.0))
    fit = context_fit(order.lengths, None, 90, plan, 5)
    assert fit.rows == 150
    assert fit.packed_rows == run.packed_rows
    assert fit.packed == run.packed_padding
    if packing == "none":
        assert fit.sorted == run.padding


def test_what_a_context_would_mean() -> None:
    fit = context_fit(
        np.array([100, 60, 40, 101, 30], dtype=np.int32), None, 100, RunPlan.model_validate({"global-batch": 4}), 1
    )
    assert (fit.over, fit.over_share, fit.rows, fit.tokens, fit.packed_rows) == (1, 0.2, 4, 230, 3)
    assert fit.sorted == 0
    assert fit.packed == pytest.approx(1 - 230 / 300)
    assert fit.full == pytest.approx(1 - 230 / 400)


def test_rows_of_a_mix_count_as_often_as_they_are_trained() -> None:
    plan = RunPlan.model_validate({"global-batch": 2, "data": {"drop-last": True}})
    lengths = np.array([10, 20, 30, 99], dtype=np.int32)
    fit = context_fit(lengths, Mix(np.array([0, 1, 1, 1]), (3.0, 1.0)), 30, plan, 1)
    assert (fit.over, fit.over_share) == (1, 0.25)
    assert (fit.rows, fit.tokens, fit.packed_rows) == (5, 80, 3)
    assert (fit.steps, fit.packed_steps) == (2, 1)


def test_a_context_in_which_nothing_fits() -> None:
    fit = context_fit(np.array([100, 60], dtype=np.int32), None, 50, RunPlan(), 1)
    assert (fit.over, fit.rows, fit.packed_rows) == (2, 0, 0)
    assert (fit.sorted, fit.packed, fit.full) == (None, None, None)


def test_the_vocabulary_is_counted() -> None:
    tokenizer = metaspace_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in ("How many apples<END_Q>", "How many<unk>", "Two")]
    found = vocabulary(ListTable([(ids, ids) for ids in rows]), tokenizer)
    counts = Counter(index for ids in rows for index in ids)
    assert found.size == len(tokenizer)
    assert found.used == len(counts)
    assert found.unknown == 1
    assert {each.name: each.count for each in found.special} == {
        "<unk>": 1,
        "<s>": 3,
        "</s>": 0,
        "<START_Q>": 0,
        "<END_Q>": 1,
        "<START_A>": 0,
        "<END_A>": 0,
    }
    special = {each.id for each in found.special}
    assert [each.count for each in found.frequent] == sorted(
        (count for index, count in counts.items() if index not in special), reverse=True
    )[: len(found.frequent)]
    assert all(counts[each.id] == each.count for each in found.frequent)


# --- how they are drawn -------------------------------------------------------------------------------------------


def test_a_histogram_in_a_terminal() -> None:
    made = histogram(np.repeat([3, 4, 6], [16, 5, 1]))
    assert list(histogram_lines(made, 20)) == [
        "3  16  " + "█" * 13,
        "4   5  ████",
        "5   0",
        "6   1  ▊",
    ]


@given(lengths, st.integers(10, 120))
def test_no_line_is_wider_than_asked(values: Any, width: int) -> None:
    lines = list(histogram_lines(histogram(values), width))
    assert all(len(line) <= max(width, 20) for line in lines)
    assert sum(int(line.split()[1]) for line in lines) == len(values)


@given(lengths, st.integers(1, 100))
def test_the_picture_has_a_bar_for_each_bin(values: Any, context: int) -> None:
    made = histogram(values)
    drawn = ElementTree.fromstring(histogram_svg(made, context, "lengths <&>"))
    bars = drawn.findall(f"{SVG}rect")
    assert [re.sub("s?$", "", str(bar.findtext(f"{SVG}title"))) for bar in bars] == [
        f"{begin:,} to {end:,} tokens: {count} row" for begin, end, count in bins(made) if count
    ]
    for bar in bars:
        assert 0 <= float(bar.attrib["x"]) <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= 720
        assert 0 <= float(bar.attrib["y"]) <= float(bar.attrib["y"]) + float(bar.attrib["height"]) <= 300
    last = made.first + len(made.counts) * made.step
    assert len(drawn.findall(f"{SVG}line[@class='mark']")) == (made.first <= context < last)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty training rows of many lengths, here."""
    rows = [{"question": "How many? " * (1 + number), "answer": f"{number}\n#### {number}"} for number in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = ("dataset", "stats", "--dataset", "gsm8k", "--dataset.train", "train.jsonl")


def test_rows_over_the_context_are_counted_not_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--context-length", "64", "--data.on-long", "error", "--global-batch", "8", "--micro-batch", "2")
    assert main([*FLAGS, *flags, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    shown = json.loads(said.out)
    (train,) = shown["splits"].values()
    assert shown["context"] == 64
    assert shown["micro_batch"] == 2
    assert train["rows"] == 40 == sum(train["histogram"]["counts"])
    assert [fit["context"] for fit in train["contexts"]] == [64, 512, 1024, 2048, 4096]
    assert 0 < train["contexts"][0]["over"] < 40
    assert train["contexts"][0]["over"] + train["contexts"][0]["rows"] == 40
    assert train["contexts"][-1]["tokens"] == train["tokens"]
    assert train["lengths"]["most"] > 64
    assert train["ends_trained"] == 1


def test_the_command_prints_tables_and_writes_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--html", "page.html", "--svg", "lengths.svg"]) == 0
    said = capsys.readouterr().out
    assert "\ntrain split\n        rows  40 of train.jsonl\n" in said
    assert re.search(r"\n→ 512 +0 +\d+\.\d % +\d+\.\d % +\d+\.\d % +\d+ +2 +\d+\n", said)
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert '<tr class="chosen"><td>512</td>' in page
    picture = (folder / "lengths.svg").read_text(encoding="utf-8")
    assert picture in page
    assert not re.search(r"url\(|@import|src=|href=", page)
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]  # a name that nothing fetches
    assert ElementTree.fromstring(picture).tag == f"{SVG}svg"
    assert not (folder / "llmft-runs").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--svg", "no/where.svg"], "--svg no/where.svg: there is no folder no: make it, or name another"),
        (["--html", "."], "--html .: is a folder: name a file in it"),
        (["--split", "test"], "--split: no such flag"),
        (["--micro-batch", "5"], "--global-batch 32 cannot be shared by 1 worker in micro-batches of 5"),
        (["--context-length", "0"], "context-length: '0'"),
    ],
)
def test_wrong_flags_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main([*FLAGS, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"llmft: error: {said}"), lines


def test_gsm8k_with_llama_2(
    gsm8k_folder: Path, llama2_tokenizer_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", "gsm8k", "--dataset.source", str(gsm8k_folder), "--model.tokenizer"]
    assert main(["dataset", "stats", *flags, str(llama2_tokenizer_model), "--json"]) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert {name: split["rows"] for name, split in splits.items()} == {"train": 7473, "test": 1319}
    fits = {name: {fit["context"]: fit for fit in split["contexts"]} for name, split in splits.items()}
    assert {name: fit[512]["over"] for name, fit in fits.items()} == {"train": 9, "test": 3}
    assert fits["train"][512]["packed"] < 0.03
    assert fits["train"][2048]["packed"] < 0.012
    assert splits["train"]["vocabulary"]["unknown"] == 0
    assert splits["train"]["ends_trained"] == 1
