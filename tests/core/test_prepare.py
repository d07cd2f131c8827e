"""Rows → token tables in a cache: right, cached, all or nothing."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import Bench, Pairs, pairs

from llmft_core import (
    InputError,
    LlmftError,
    Options,
    SourceOptions,
    Split,
)
from llmft_core.data import build
from llmft_core.data.encode import Encoder
from llmft_core.data.prepare import PreparedData, prepare
from llmft_core.data.sources import find_sources
from llmft_core.plan import RunPlan


class MadePairs(Pairs):
    options_type = Options

    def generate(self, split: Split) -> Iterator[dict[str, Any]] | None:
        return ({"q": f"{number}+1", "a": str(number + 1)} for number in range(20)) if split == "train" else None


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_rows_become_tables(bench: Bench) -> None:
    bench.write("train", [{"q": "1+1", "a": "two"}, "", {"q": "2+2", "a": "four"}])
    bench.write("test", [{"q": "3+3", "a": "six"}])
    data = bench.prepare()
    assert data.folder == bench.cache / "data" / data.digest
    assert [len(data.train), data.test and len(data.test)] == [2, 1]
    ids, labels = data.train.row(1)
    assert bench.tokenizer.decode(ids) == "<START_Q>2+2<END_Q><START_A>four<END_A>"
    assert bench.tokenizer.decode(labels[labels != -100]) == "four<END_A>"
    assert str(data.train.origin(1)) == f"{bench.source}/train.jsonl:3"
    train = data.report.splits["train"]
    assert (train.rows_read, train.rows, train.dropped, train.cut) == (2, 2, 0, 0)
    assert train.tokens == data.train.total_tokens == data.train.length(0) + data.train.length(1)
    assert train.trained_tokens == data.train.trained_tokens(0) + data.train.trained_tokens(1)
    assert train.ends_trained == 1
    assert train.longest == train.longest_read == max(data.train.length(0), data.train.length(1))


def test_workers_open_the_folder_alone(bench: Bench) -> None:
    bench.write("train", pairs(3))
    data = bench.prepare()
    opened = PreparedData.open(data.folder)
    assert opened.report == data.report
    assert opened.digest == data.digest
    assert opened.test is None
    assert opened.train.origin(2) == data.train.origin(2)
    assert opened.train.row(2)[0].tolist() == data.train.row(2)[0].tolist()


def test_a_second_start_only_hashes(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench.write("train", pairs(30))
    first = bench.prepare(context_length=14, data={"max-dropped": 1})
    assert first.report.splits["train"].dropped_origins

    def never(*args: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Encoder, "encode_batch", never)
    second = bench.prepare(context_length=14, data={"max-dropped": 1})
    assert second.digest == first.digest
    assert second.report == first.report
    # The same bytes elsewhere are the same data, under their new name.
    moved = bench.source.rename(tmp_path / "moved")
    bench.source = moved
    third = bench.prepare(context_length=14, data={"max-dropped": 1})
    assert third.digest == first.digest
    assert third.train.origin(0).source == f"{moved}/train.jsonl"
    assert third.report.splits["train"].dropped_origins[0].startswith(f"{moved}/train.jsonl:")
    with pytest.raises(InputError, match=r"--data\.max-dropped"):  # the limit holds for what is cached, too
        bench.prepare(context_length=14, data={"max-dropped": 0.01})


def test_what_the_key_depends_on(bench: Bench) -> None:
    bench.write("train", pairs(20))
    base = bench.prepare()
    same = [bench.prepare(lr=1.0, seed=3), bench.prepare(data={"max-dropped": 0.5})]
    assert {one.digest for one in same} == {base.digest}
    others = [
        bench.prepare(fingerprint="other"),
        bench.prepare(context_length=100),
        bench.prepare(data={"on-long": "truncate"}),
        bench.prepare(data={"train-on": "all"}),
        bench.prepare(data={"validation-fraction": 0.5}),
        bench.prepare(data={"validation-fraction": 0.5}, seed=3),
    ]
    assert others[1].report.content_digest == base.report.content_digest != others[3].report.content_digest
    bench.write("train", pairs(21))
    others.append(bench.prepare())
    bench.write("test", pairs(1))
    others.append(bench.prepare())
    digests = {base.digest, *(one.digest for one in others)}
    assert len(digests) == 1 + len(others)
    assert bench.folders() == digests


EDITED = """
from llmft_core import Conversation, DatasetFormat, Message, SourceOptions
class Edited(DatasetFormat):
    name, summary, options_type = "edited", "s", SourceOptions
    def parse(self, row):
        return Conversation((Message("assistant", row["a"], True),))
"""


def test_editing_the_format_makes_new_rows(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("train", pairs(3))
    module = tmp_path / "edited_format.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = set()
    for comment in ("# one", "# two"):
        module.write_text(EDITED + comment)
        edited = importlib.import_module("edited_format")
        dataset = edited.Edited(SourceOptions.model_validate({"source": str(bench.source)}))
        digests.add(bench.prepare(dataset=dataset).digest)
    assert len(digests) == 2


def test_generated_rows(bench: Bench) -> None:
    data = bench.prepare(dataset=MadePairs(Options()))
    assert len(data.train) == 20
    assert str(data.train.origin(19)) == "pairs:train:20"
    assert bench.prepare(dataset=MadePairs(Options())).digest == data.digest


def test_a_process_that_is_killed_leaves_no_table(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("train", pairs(3))
    with monkeypatch.context() as patch:
        patch.setattr(build.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bench.prepare()
    assert bench.folders() == set()
    data = bench.prepare()
    # What a killed process could leave under the lock is in nobody's way.
    data.folder.rename(data.folder.with_name(f".{data.digest}.draft"))
    assert bench.prepare().digest == data.digest
    assert bench.folders() == {data.digest}


PREPARE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from bench import Bench
data = Bench(Path(sys.argv[2])).prepare()
print(data.digest, len(data.train))
"""


def test_two_processes_at_once(bench: Bench, tmp_path: Path) -> None:
    bench.write("train", pairs(2000))
    support = Path(__file__).parents[1] / "support"
    command = [sys.executable, "-c", PREPARE, str(support), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] == f"{bench.prepare().digest} 2000\n"


def test_a_damaged_cache_is_named(bench: Bench) -> None:
    bench.write("train", pairs(3))
    data = bench.prepare()
    (data.folder / "train" / "ids.npy").unlink()
    with pytest.raises(LlmftError, match=r"the token cache .* is damaged .*: remove that folder and start again"):
        bench.prepare()
    with pytest.raises(LlmftError, match="is damaged"):
        PreparedData.open(bench.cache / "nothing")


def test_a_flipped_byte_in_the_cache_is_found_where_it_is_read_again(bench: Bench) -> None:
    bench.write("train", pairs(3))
    path = bench.prepare().folder / "train" / "ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LlmftError, match=r"is damaged \(its tokens are not those that were written\): remove"):
        bench.prepare(data={"rehash": True})


@pytest.mark.parametrize("name", ["ids", "trained", "offsets", "lines", "files"])
def test_an_array_that_is_cut_off_is_found(bench: Bench, name: str) -> None:
    bench.write("train", pairs(3))
    path = bench.prepare().folder / "train" / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LlmftError, match="is damaged"):
        bench.prepare()


def test_a_cache_that_cannot_be_written(bench: Bench) -> None:
    bench.write("train", pairs(3))
    bench.cache.write_text("a file")
    with pytest.raises(LlmftError, match=r"cannot write the token cache .*; set LLMFT_CACHE"):
        bench.prepare()


def test_tables_do_not_travel_as_copies(bench: Bench) -> None:
    bench.write("train", pairs(3))
    data = bench.prepare()
    assert pickle.loads(pickle.dumps(data.report)) == data.report


# --- the real thing -----------------------------------------------------------------------------------------------


def test_gsm8k_with_the_llama2_tokenizer(gsm8k_folder: Path, llama2_tokenizer_model: Path, tmp_path: Path) -> None:
    gsm8k = importlib.import_module("llmft_plugins.datasets.gsm8k")
    llama2 = importlib.import_module("llmft_plugins.models.llama2")
    tokenizer = llama2.from_sentencepiece(llama2_tokenizer_model)
    tokenizer.add_tokens(list(gsm8k.Gsm8k.special_tokens), special_tokens=True)
    dataset = gsm8k.Gsm8k(gsm8k.Gsm8kOptions.model_validate({"source": str(gsm8k_folder)}))
    data = prepare(dataset, find_sources(dataset, None), RunPlan(), tokenizer, "print", tmp_path)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (7473 - 9, 1319 - 3)
    splits = data.report.splits
    assert (splits["train"].dropped, splits["test"].dropped) == (9, 3)
    assert splits["train"].ends_trained == splits["test"].ends_trained == 1
    assert 0.6 < splits["train"].trained_tokens / splits["train"].tokens < 0.7
    ids, labels = data.train.row(0)
    assert tokenizer.decode(ids).startswith("<s><START_Q>Natalia sold clips to 48 of her friends in April")
    assert tokenizer.decode(labels[labels != -100]).endswith("\n#### 72<END_A>")
    assert data.train.trained_tokens(0) == np.count_nonzero(labels != -100)
