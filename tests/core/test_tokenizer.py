"""Tokenizers as a run gets them: special tokens, other tokenizers than the model's, fingerprints, what is saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Proxy

from llmft_core import InputError
from llmft_core.catalog import Catalog
from llmft_core.cli.main import main
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.storage.places import Place, Places
from llmft_core.storage.transfer import upload_many, write_bytes
from llmft_core.weights.stage import ModelFolder, stage_model
from llmft_core.weights.tokenizer import fingerprint, load_tokenizer, save_tokenizer


@dataclass(frozen=True)
class Mirror:
    """A mirror behind a proxy that counts."""

    uri: str
    proxy: Proxy


TAGS = ("<START_Q>", "<END_Q>", "<START_A>", "<END_A>")
TEXTS = [
    "<START_Q>She has 12 apples. How many?<END_Q><START_A>12 / 2 = <<12/2=6>>6\n#### 6<END_A>",
    "x<END_Q>inform <END_A> inform",
    "Überraschung 数学 😀",
]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(load_plugins())


@pytest.fixture(scope="module")
def places(catalog: Catalog) -> Places:
    return Places(catalog, None, {})


@pytest.fixture(scope="module")
def tiny(catalog: Catalog, places: Places) -> ModelFolder:
    return stage_model(RunPlan.model_validate({"model": "llama-2-tiny"}), catalog, places, weights=False)


@pytest.fixture
def folder(tmp_path: Path, tiny: ModelFolder) -> Path:
    """A copy of the tiny model without weights, to be changed."""
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.path / name, copy)
    return copy


def at(folder: Path, tiny: ModelFolder) -> ModelFolder:
    return ModelFolder(folder, tiny.family, tiny.config, "")


def ids_in_process(folder: Path) -> list[list[int]]:
    """As a server would: transformers alone, in a fresh process."""
    code = (
        "import sys, json; from transformers import AutoTokenizer;"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(json.dumps([tokenizer(text)['input_ids'] for text in json.loads(sys.argv[2])]))"
    )
    command = [sys.executable, "-c", code, str(folder), json.dumps(TEXTS)]
    result: list[list[int]] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return result


def change(path: Path, **settings: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    data.update(settings)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}), encoding="utf-8")


# --- special tokens -----------------------------------------------------------------------------------------------


def test_each_special_token_is_one_new_id(tiny: ModelFolder, places: Places) -> None:
    tokenizer = load_tokenizer(tiny, "", TAGS, places)
    assert tokenizer.convert_tokens_to_ids(list(TAGS)) == [4096, 4097, 4098, 4099]
    assert len(tokenizer) == 4100
    for token in TAGS:
        ids = tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
    text = TEXTS[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).startswith("She has 12 apples.")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 2, 1)


def test_a_named_token_may_be_special_too_and_none_is_added_twice(tiny: ModelFolder, places: Places) -> None:
    tokenizer = load_tokenizer(tiny, "", ["</s>", "<A>", "<A>"], places)
    assert len(tokenizer) == 4097
    assert tokenizer.eos_token_id == 2
    assert tokenizer.extra_special_tokens == ["<A>"]


def test_a_token_that_cannot_be_one_id_is_refused(tiny: ModelFolder, places: Places) -> None:
    with pytest.raises(InputError, match="the dataset's token '' becomes 0 ids, not one"):
        load_tokenizer(tiny, "", [""], places)


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_a_tokenizer_without_bos_or_eos_is_refused(tiny: ModelFolder, places: Places, folder: Path, role: str) -> None:
    settings = {f"{role}_token": ...}
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **settings)
    change(folder / "tokenizer.json", added_tokens=[])
    with pytest.raises(InputError, match=f"no {role}_token"):
        load_tokenizer(at(folder, tiny), "", TAGS, places)


def test_padding_falls_back_to_eos_and_what_is_set_is_kept(tiny: ModelFolder, places: Places, folder: Path) -> None:
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", unk_token=...)
    assert load_tokenizer(at(folder, tiny), "", TAGS, places).pad_token_id == 2
    change(folder / "tokenizer_config.json", pad_token="▁the")
    assert load_tokenizer(at(folder, tiny), "", TAGS, places).pad_token == "▁the"


def test_truncation_of_an_export_is_undone(tiny: ModelFolder, places: Places, folder: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    change(folder / "tokenizer.json", truncation=truncation)
    tokenizer = load_tokenizer(at(folder, tiny), "", TAGS, places)
    assert len(tokenizer(TEXTS[0])["input_ids"]) > 20


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_one_line(tiny: ModelFolder, places: Places, folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer .*model: .*--model\.tokenizer FOLDER") as caught:
        load_tokenizer(at(folder, tiny), "", TAGS, places)
    assert "\n" not in str(caught.value)


# --- another tokenizer than the model's ---------------------------------------------------------------------------


def test_another_tokenizer_by_folder_file_and_uri(
    tiny: ModelFolder, places: Places, tmp_path: Path, llama2_tokenizer_model: Path
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    shutil.copy(llama2_tokenizer_model, given / "tokenizer.model")
    model = given / "tokenizer.model"
    found = {
        override: fingerprint(load_tokenizer(tiny, override, TAGS, places))
        for override in (str(given), str(model), given.as_uri(), model.as_uri())
    }
    assert len(set(found.values())) == 1
    assert found[str(given)] != fingerprint(load_tokenizer(tiny, "", TAGS, places))
    save_tokenizer(load_tokenizer(tiny, str(model), TAGS, places), tmp_path / "saved", tiny.path)
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "saved" / "tokenizer.json", tmp_path / "one")
    for override in (tmp_path / "one" / "tokenizer.json", (tmp_path / "one" / "tokenizer.json").as_uri()):
        assert fingerprint(load_tokenizer(tiny, str(override), TAGS, places)) == found[str(given)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("{here}/nowhere", "no such file or folder; give a folder, a tokenizer.json or tokenizer.model, a hub id"),
        ("{here}", "no tokenizer.json or tokenizer.model in it"),
        ("{here}/vocab.bpe", "give a folder, or a file called tokenizer.json or tokenizer.model"),
        ("file://{here}", "no file of a model there"),
        ("owner/nowhere", "HF_HUB_OFFLINE"),
    ],
)
def test_another_tokenizer_that_is_not_there(
    tiny: ModelFolder, places: Places, tmp_path: Path, override: str, message: str
) -> None:
    (tmp_path / "vocab.bpe").write_text("x")
    with pytest.raises(InputError, match=message):
        load_tokenizer(tiny, override.format(here=tmp_path), TAGS, places)


# --- from a mirror ------------------------------------------------------------------------------------------------

LAYOUTS = ("owner--name", "owner/name", "models--owner--name/snapshots/abc")


@pytest.fixture
def mirror(s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, own_name: str) -> Mirror:
    """A mirror in S3 of this test alone. Nobody may ask the hub in a test."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.url)
    return Mirror(f"s3://bucket/{own_name}", s3_proxy)


@pytest.fixture
def other(tiny: ModelFolder, places: Places, tmp_path: Path) -> Path:
    """A model with one token more."""
    folder = tmp_path / "other"
    save_tokenizer(load_tokenizer(tiny, "", ["<MORE>"], places), folder, tiny.path)
    shutil.copy(tiny.path / "config.json", folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def lay(folder: Path, place: Place) -> None:
    upload_many([(path, place / path.name) for path in folder.iterdir()])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hub_id_comes_from_the_mirror(
    tiny: ModelFolder, catalog: Catalog, mirror: Mirror, other: Path, layout: str
) -> None:
    places = Places(catalog, None, {})
    place = places.place(mirror.uri)
    lay(other, place / layout)
    if "snapshots" in layout:
        write_bytes(place / "models--owner--name/refs/main", b"abc")
    tokenizer = load_tokenizer(tiny, "owner/name", TAGS, places, mirror.uri)
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(at(other, tiny), "", TAGS, places))
    assert mirror.proxy.count(b"GET", b"/tokenizer.json") > 0
    assert mirror.proxy.count(b"GET", b"model.safetensors ") == 0, "its weights are nobody's affair"
    before = mirror.proxy.count(b"GET", b"/tokenizer.json")
    assert fingerprint(load_tokenizer(tiny, "owner/name", TAGS, places, mirror.uri)) == fingerprint(tokenizer)
    assert mirror.proxy.count(b"GET", b"/tokenizer.json") == before, "the second time from this node's cache"


def test_what_the_mirror_lacks_is_not_asked_of_the_hub(
    mirror: Mirror, other: Path, catalog: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before anything is started, by the command that says what would happen."""
    lay(other, Places(catalog, None, {}).place(mirror.uri) / "another--name")
    plan = ["plan", "--model", "llama-2-tiny", "--dataset", "arithmetic", "--workers", "0"]
    reach = ["--weights.mirror", mirror.uri, "--model.tokenizer"]
    assert main([*plan, *reach, "owner/name"]) == 2
    error = capsys.readouterr().err
    assert f"model.tokenizer: tokenizer owner/name is not in the mirror {mirror.uri}: looked for owner--name/" in error
    assert "found another--name/; put it there with `llmft weights mirror owner/name" in error
    assert "or give --model.tokenizer FOLDER" in error
    assert main([*plan, *reach, "another/name"]) == 0


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_what_the_tokenizer_does(tiny: ModelFolder, places: Places) -> None:
    from tokenizers import pre_tokenizers

    first = fingerprint(load_tokenizer(tiny, "", TAGS, places))
    assert first == fingerprint(load_tokenizer(tiny, "", TAGS, places))
    assert len(first) == 64
    assert first != fingerprint(load_tokenizer(tiny, "", TAGS[:3], places))
    assert first != fingerprint(load_tokenizer(tiny, "", tuple(reversed(TAGS)), places))
    other = load_tokenizer(tiny, "", TAGS, places)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    assert first != fingerprint(other), "text after an added token is told apart"
    without_bos = load_tokenizer(tiny, "", TAGS, places)
    without_bos.add_bos_token = False
    assert first != fingerprint(without_bos)


# --- what is saved ------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_has_all_files_and_the_same_ids(tiny: ModelFolder, places: Places, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny, "", TAGS, places)
    saved = tmp_path / "saved"
    save_tokenizer(tokenizer, saved, tiny.path)
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    assert {path.name for path in saved.iterdir()} == names
    assert json.loads((saved / "added_tokens.json").read_text()) == dict(zip(TAGS, range(4096, 4100), strict=True))
    assert json.loads((saved / "special_tokens_map.json").read_text()) == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        "additional_special_tokens": list(TAGS),
    }  # fmt: skip
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["legacy"] is False
    assert config["additional_special_tokens"] == list(TAGS)
    assert not isinstance(config.get("extra_special_tokens"), list), "transformers 4 crashes on it"
    assert ids_in_process(saved) == tokenizer(TEXTS)["input_ids"]
    again = load_tokenizer(at(saved, tiny), "", TAGS, places)
    assert fingerprint(again) == fingerprint(tokenizer)
    assert again.extra_special_tokens == list(TAGS)
    assert again.pad_token_id == 0
    save_tokenizer(again, tmp_path / "twice", saved)
    for name in names:
        assert (tmp_path / "twice" / name).read_text() == (saved / name).read_text()


def test_tokenizer_model_is_copied_where_it_is_of_this_vocabulary(
    tiny: ModelFolder, places: Places, tmp_path: Path, llama2_tokenizer_model: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(llama2_tokenizer_model, source / "tokenizer.model")
    (source / "tokenizer.model").chmod(0o644)
    tokenizer = load_tokenizer(at(source, tiny), "", TAGS, places)
    save_tokenizer(tokenizer, tmp_path / "saved", source)
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == llama2_tokenizer_model.read_bytes()
    assert ids_in_process(tmp_path / "saved") == tokenizer(TEXTS)["input_ids"]
    save_tokenizer(tokenizer, tmp_path / "saved", tmp_path / "saved")  # over itself
    save_tokenizer(load_tokenizer(tiny, "", TAGS, places), tmp_path / "other", source)
    assert not (tmp_path / "other" / "tokenizer.model").exists(), "another vocabulary"
    (source / "tokenizer.model").write_text("IQ== 0\n")
    save_tokenizer(tokenizer, tmp_path / "third", source)
    assert not (tmp_path / "third" / "tokenizer.model").exists()


def test_a_chat_template_survives(tiny: ModelFolder, places: Places, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny, "", TAGS, places)
    tokenizer.chat_template = "{% for m in messages %}<START_Q>{{ m.content }}<END_Q>{% endfor %}"
    save_tokenizer(tokenizer, tmp_path / "saved", tiny.path)
    again = load_tokenizer(at(tmp_path / "saved", tiny), "", TAGS, places)
    messages = [{"role": "user", "content": "The?"}]
    assert again.apply_chat_template(messages, tokenize=False) == "<START_Q>The?<END_Q>"
    assert fingerprint(again) == fingerprint(tokenizer)


def test_the_tokenizer_of_another_family(catalog: Catalog, places: Places, tmp_path: Path) -> None:
    """A byte-level one, by the fallback family: GPT-2's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["a b c"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>")
    made.save_pretrained(tmp_path)
    family = next(family for family in catalog.families() if family.name == "auto")
    tokenizer = load_tokenizer(ModelFolder(tmp_path, family, {}, ""), "", TAGS, places)
    assert tokenizer.pad_token == "<|end|>"
    save_tokenizer(tokenizer, tmp_path / "saved", tmp_path)
    assert ids_in_process(tmp_path / "saved") == tokenizer(TEXTS)["input_ids"]
