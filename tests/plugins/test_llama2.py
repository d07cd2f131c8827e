"""The family Llama 2: exact sizes, the tiny model, and a tokenizer that is sentencepiece's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from llmft_core import InputError, ModelFamily, Options
from llmft_plugins.models import tiny
from llmft_plugins.models.llama2 import Llama2

WEIGHTS_SHA256 = "b65865b24dd488ccdd712df1cc84dec01353e0090e6ccae6541213a7a0232034"
TAGS = ["<START_Q>", "<END_Q>", "<START_A>", "<END_A>"]
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def family() -> Llama2:
    return Llama2(Options())


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, family: Llama2) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    family.build("llama-2-tiny", folder)
    return folder


def texts_of(gsm8k_folder: Path) -> list[str]:
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (gsm8k_folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [text for row in rows for text in row.values()]


# --- names and sizes ----------------------------------------------------------------------------------------------


def test_names_and_hub_ids(family: Llama2) -> None:
    assert set(family.names) == {
        *(f"llama-2-{size}{chat}" for size in ("7b", "13b", "70b") for chat in ("", "-chat")),
        "llama-2-tiny",
    }
    assert family.hub_id("llama-2-7b") == "meta-llama/Llama-2-7b-hf"
    assert family.hub_id("llama-2-70b-chat") == "meta-llama/Llama-2-70b-chat-hf"
    assert family.hub_id("llama-2-tiny") is None
    assert family.learning_rate("llama-2-7b") == family.learning_rate("some/llama") == 2e-5
    assert family.learning_rate("llama-2-tiny") > 1e-3
    assert family.claims({"model_type": "llama"})
    assert not family.claims({"model_type": "mistral"})
    assert not family.claims({})


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 6_738_415_616),
        (
            {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
             "num_key_value_heads": 40},
            13_015_864_320,
        ),
        (
            {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8},
            68_976_648_192,
        ),
    ],
    ids=["7b", "13b", "70b"],
)  # fmt: skip
def test_the_published_sizes(family: Llama2, changes: dict[str, Any], parameters: int) -> None:
    assert family.size({**LLAMA, **changes}).parameters == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        {"head_dim": 24},
        {"num_key_value_heads": None},
    ],
    ids=["plain", "gqa", "tied", "biases", "head_dim", "no_kv_heads"],
)
def test_size_is_that_of_the_instantiated_model(family: Llama2, changes: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {**LLAMA, "hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 8,
             "num_key_value_heads": 8, "vocab_size": 500, **changes}  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in small.items() if key != "model_type"}))
    size = family.size(small)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    linear = [module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert size.matmul_parameters == sum(linear)


# --- the tiny model -----------------------------------------------------------------------------------------------


def test_the_tiny_model_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from llmft_plugins.models import tiny;"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir(); tiny.build(folder)"
    )
    digests = []
    for seed, threads in (("1", "1"), ("2", "4")):
        folder = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True)
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    # Pinned: the weights are made by exact operations, so no library and no machine may change them.
    assert digests[0]["model.safetensors"] == WEIGHTS_SHA256


def test_the_tiny_model_loads_whole_and_starts_from_uniform_guesses(tiny_folder: Path, family: Llama2) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(tiny_folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    config = json.loads((tiny_folder / "config.json").read_text())
    assert family.claims(config)
    assert family.size(config).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config["max_position_embeddings"] == 2048
    ids = torch.arange(3, 403).reshape(4, 100)  # (B, T)
    loss = model(input_ids=ids, labels=ids).loss
    assert abs(loss.item() - torch.log(torch.tensor(4096.0)).item()) < 0.3  # nats a token
    assert 0.0195 < model.lm_head.weight.std().item() < 0.0205


def test_the_tiny_tokenizer_is_of_llamas_kind(tiny_folder: Path, family: Llama2) -> None:
    from transformers import AutoTokenizer, LlamaTokenizer

    for tokenizer in (family.load_tokenizer(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)):
        assert isinstance(tokenizer, LlamaTokenizer)
        assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert len(tokenizer) == 4096
        assert tokenizer.tokenize("She has 148 apples.\n") == ["▁She", "▁has", "▁1", "4", "8", "▁apples", ".", "<0x0A>"]
        assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
        ids = tokenizer("Two é\tand  數 😀 <<1+1=2>>\n#### 2")["input_ids"]
        assert ids[0] == 1, "a text begins with <s>"
        assert tokenizer.decode(ids[1:]) == "Two é\tand  數 😀 <<1+1=2>>\n#### 2"
        assert 0 not in ids, "bytes stand for what is not in the vocabulary"
        tokenizer.add_special_tokens({"extra_special_tokens": TAGS})
        assert tokenizer.tokenize("x<END_Q>Then") == ["▁x", "<END_Q>", *tokenizer.tokenize("<END_Q>Then")[1:]]
        assert not tokenizer.tokenize("x<END_Q>Then")[2].startswith("▁")


def test_gsm8k_fits_into_512_tokens_of_the_tiny_tokenizer(
    tiny_folder: Path, family: Llama2, gsm8k_folder: Path
) -> None:
    tokenizer = family.load_tokenizer(tiny_folder)
    tokenizer.add_special_tokens({"extra_special_tokens": TAGS})
    rows = [json.loads(line) for line in (gsm8k_folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [f"<START_Q>{row['question']}<END_Q><START_A>{row['answer']}<END_A>" for row in rows]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert sum(length <= 512 for length in lengths) / len(lengths) > 0.995
    assert sum(lengths) / len(lengths) < 210, "about as few as Llama 2's own, which has 200"


def test_the_tiny_model_learns_in_fifty_steps_at_its_learning_rate(tiny_folder: Path, family: Llama2) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from llmft_plugins.datasets.arithmetic import Arithmetic, ArithmeticOptions

    tokenizer = family.load_tokenizer(tiny_folder)
    rows = list(Arithmetic(ArithmeticOptions()).generate("train"))[: 15 * 8]
    ids = [tokenizer(row["question"] + row["answer"])["input_ids"][:64] for row in rows]
    batches = torch.tensor([row for row in ids if len(row) == 64][:80]).reshape(-1, 8, 64)  # (steps, B, T)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=family.learning_rate("llama-2-tiny"), weight_decay=0.0)
    losses = []
    for step in range(45):
        batch = batches[step % len(batches)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 8
    assert losses[-1] < 4, losses


def test_only_the_tiny_model_is_built(family: Llama2, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="downloaded"):
        family.build("llama-2-7b", tmp_path)


def test_a_corpus_that_became_too_small_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "_corpus", lambda: iter(["▁a"]))
    with pytest.raises(RuntimeError, match="4096"):
        tiny.tokenizer()


# --- tokenizers ---------------------------------------------------------------------------------------------------


def test_a_bare_tokenizer_model_gives_sentencepieces_ids(
    family: Llama2, llama2_tokenizer_model: Path, gsm8k_folder: Path, tmp_path: Path
) -> None:
    from sentencepiece import SentencePieceProcessor

    shutil.copy(llama2_tokenizer_model, tmp_path / "tokenizer.model")
    original = SentencePieceProcessor(model_file=str(llama2_tokenizer_model))
    texts = texts_of(gsm8k_folder)
    expected = [[1, *ids] for ids in original.encode(texts)]
    tokenizer = family.load_tokenizer(tmp_path)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer(texts)["input_ids"] == expected
    tokenizer.add_special_tokens({"extra_special_tokens": TAGS})
    assert tokenizer(texts)["input_ids"] == expected
    assert tokenizer.convert_tokens_to_ids(TAGS) == [32000, 32001, 32002, 32003]

    tokenizer.save_pretrained(tmp_path / "saved")
    again = family.load_tokenizer(tmp_path / "saved")
    assert again(texts)["input_ids"] == expected
    for loaded in (tokenizer, again):
        assert loaded.tokenize("x<END_Q>inform<END_A> inform") == ["▁x", "<END_Q>", "in", "form", "<END_A>", "▁inform"]
        row = f"<START_Q>{texts[0]}<END_Q><START_A>{texts[1]}<END_A>"
        assert loaded.decode(loaded(row)["input_ids"]) == f"<s>{row}"


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("prepending", ["normalizer", "metaspace"])
def test_older_exports_put_no_space_after_added_tokens(
    family: Llama2, tiny_folder: Path, tmp_path: Path, prepending: str, tokenizer_class: str, legacy: bool | None
) -> None:
    """As transformers 4 wrote them: the space by a normalizer, or `always`, with or without `legacy`."""
    folder = tmp_path / "old"
    shutil.copytree(tiny_folder, folder)
    tokenizer_json = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if prepending == "normalizer":
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        prepend = {"type": "Prepend", "prepend": "▁"}
        tokenizer_json["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
        tokenizer_json["pre_tokenizer"] = None
    else:
        tokenizer_json["pre_tokenizer"]["prepend_scheme"] = "always"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["legacy"]
    config.update({"tokenizer_class": tokenizer_class}, **({} if legacy is None else {"legacy": legacy}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    reference = family.load_tokenizer(tiny_folder)
    loaded = family.load_tokenizer(folder)
    loaded.add_special_tokens({"extra_special_tokens": TAGS})
    loaded.save_pretrained(tmp_path / "saved")
    again = family.load_tokenizer(tmp_path / "saved")
    reference.add_special_tokens({"extra_special_tokens": TAGS})
    for text in ("She has 12 apples.\n#### 12", "x<END_Q>The <END_A> The", "<START_Q>The", " The"):
        assert loaded(text)["input_ids"] == reference(text)["input_ids"]
        assert again(text)["input_ids"] == reference(text)["input_ids"]


def test_a_byte_level_tokenizer_of_a_llama_is_left_alone(family: Llama2, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["a b c"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(tmp_path)
    loaded = family.load_tokenizer(tmp_path)
    assert loaded("The <s>The")["input_ids"] == made("The <s>The")["input_ids"]


def test_what_is_no_llama_tokenizer_is_refused(family: Llama2, tmp_path: Path) -> None:
    import sentencepiece

    with pytest.raises(InputError, match=r"no tokenizer .*--model\.tokenizer"):
        family.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Llama 3's: base64 and a rank
    with pytest.raises(InputError, match="not a sentencepiece model"):
        family.load_tokenizer(tmp_path)
    with warnings.catch_warnings():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["How many clips did she sell altogether?"] * 50),
            model_prefix=str(tmp_path / "tokenizer"),
            vocab_size=60,
            model_type="unigram",
            byte_fallback=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    with pytest.raises(InputError, match="not of Llama's kind"):
        family.load_tokenizer(tmp_path)


def test_the_hook_offers_it() -> None:
    from llmft_plugins.models import llama2

    offered: list[type[ModelFamily]] = llama2.llmft_model_families()
    assert offered == [Llama2]
