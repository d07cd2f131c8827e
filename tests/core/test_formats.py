"""A plan's dataset, opened: companions, their places, and the roles that are trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmft_core import InputError
from llmft_core.catalog import Catalog
from llmft_core.data.formats import open_dataset
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.storage.places import Places

TOKENS = ["<USER>", "</USER>", "<BOT>", "</BOT>"]
ROW = {"input": "<USER>a</USER><BOT>b</BOT>"}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(load_plugins())


def write(folder: Path, tokens: Any = None, *splits: str) -> Path:
    folder.mkdir(exist_ok=True)
    for split in splits or ("train",):
        (folder / f"{split}.jsonl").write_text(json.dumps(ROW) + "\n")
    if tokens is not None:
        (folder / "tokens.json").write_text(json.dumps({"tokens": tokens}))
    return folder


def opened(catalog: Catalog, train_on: str = "completion", **options: Any) -> Any:
    plan = RunPlan.model_validate({"dataset": {"name": "chat-tags", **options}, "data": {"train-on": train_on}})
    return open_dataset(catalog, plan, Places(catalog, None, {}))


def test_tokens_beside_the_rows(catalog: Catalog, tmp_path: Path) -> None:
    dataset, sources = opened(catalog, source=str(write(tmp_path, TOKENS, "train", "test")))
    assert dataset.special_tokens == tuple(TOKENS)
    assert set(sources) == {"train", "test"}
    assert set(dataset.companion_digests) == {"tokens.json"}


def test_tokens_elsewhere(catalog: Catalog, tmp_path: Path) -> None:
    rows, other = write(tmp_path / "rows"), write(tmp_path / "other", TOKENS)
    uri = f"file://{other}/tokens.json"
    for tokens in (str(other / "tokens.json"), uri):
        dataset, _ = opened(catalog, train=str(rows / "train.jsonl"), tokens=tokens)
        assert dataset.special_tokens == tuple(TOKENS)


def test_no_tokens(catalog: Catalog, tmp_path: Path) -> None:
    folder = write(tmp_path)
    expected = f"there is no tokens.json beside {folder}/train.jsonl: put one there, or name it with --dataset.tokens"
    with pytest.raises(InputError, match=re.escape(expected)):
        opened(catalog, source=str(folder))
    with pytest.raises(InputError, match=r"--dataset\.tokens: there is no file gone\.json"):
        opened(catalog, source=str(folder), tokens="gone.json")


def test_two_splits_with_different_tokens(catalog: Catalog, tmp_path: Path) -> None:
    train, test = write(tmp_path / "a", TOKENS), write(tmp_path / "b", TOKENS[::-1])
    with pytest.raises(
        InputError, match=r"the tokens.json beside .*b/train.jsonl is another one than beside .*a/train"
    ):
        opened(catalog, train=str(train / "train.jsonl"), test=str(test / "train.jsonl"))


def test_wrong_tokens_are_named_with_their_file(catalog: Catalog, tmp_path: Path) -> None:
    folder = write(tmp_path, ["<USER>"])
    with pytest.raises(InputError, match=r"^tokens.json: <USER> has no partner"):
        opened(catalog, source=str(folder))
    with pytest.raises(InputError, match=rf"^{folder}/tokens.json: <USER> has no partner"):
        opened(catalog, source=str(folder), tokens=f"{folder}/tokens.json")


@pytest.mark.parametrize("train_on", ["completion", "all", "BOT", "USER, BOT"])
def test_roles_that_there_are(catalog: Catalog, tmp_path: Path, train_on: str) -> None:
    dataset, _ = opened(catalog, train_on, source=str(write(tmp_path, TOKENS)))
    assert [role.name for role in dataset.roles] == ["USER", "BOT"]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("bot", "data.train-on: no row has the role bot (did you mean BOT?); there are USER, BOT"),
        ("BOTT", "data.train-on: no row has the role BOTT (did you mean BOT?); there are USER, BOT"),
        ("assistant", "data.train-on: no row has the role assistant; there are USER, BOT"),
    ],
)
def test_a_role_that_there_is_not(catalog: Catalog, tmp_path: Path, train_on: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(catalog, train_on, source=str(write(tmp_path, TOKENS)))
    assert str(caught.value) == expected


def test_which_role_is_learnt_has_to_be_known(catalog: Catalog, tmp_path: Path) -> None:
    folder = write(tmp_path, ["<X>", "</X>", "<Y>", "</Y>"])
    with pytest.raises(InputError) as caught:
        opened(catalog, source=str(folder))
    assert str(caught.value) == (
        "data.train-on: which of the roles X, Y is to be learnt cannot be told from their names: name one or several "
        "(ROLE,…), or say all"
    )
    assert opened(catalog, "Y", source=str(folder))


def test_equal_tokens_have_equal_digests_wherever_they_lie(catalog: Catalog, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", TOKENS), write(tmp_path / "b", TOKENS)
    third = write(tmp_path / "c", [*TOKENS, "<X>", "</X>"])
    digests = [opened(catalog, source=str(folder))[0].companion_digests for folder in (first, second, third)]
    assert digests[0] == digests[1] != digests[2]
