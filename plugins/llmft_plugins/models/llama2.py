"""Llama 2, and a tiny model of its architecture that needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from llmft_core import InputError, ModelFamily, ModelSize, hookimpl

llmft_api = 1

SIZES = [f"{size}{chat}" for size in ("7b", "13b", "70b") for chat in ("", "-chat")]
HUB_IDS = {f"llama-2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in SIZES}
TINY = "llama-2-tiny"

PROBES = ("How many clips did she sell altogether?", "48/2 =  <<48/2=24>>24\n#### 24 ", "Überraschung – 数 é\t½ Ⅷ ﬁ")


# What Meta's own code writes (llama/generation.py, `chat_completion`): BOS and EOS around each pair of messages, the
# system message folded into the first user message, all trimmed; and it refuses messages that hold its marks. The
# space before [INST] is the one that sentencepiece puts before every text: it is written out here, because to a fast
# tokenizer a text behind <s> is not the first.
CHAT_TEMPLATE = r"""
{%- set turns = messages -%}
{%- set system = '' -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set turns = messages[1:] -%}
  {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
{%- endif -%}
{%- for message in messages -%}
  {%- for mark in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'] -%}
    {%- if mark in message['content'] -%}
      {{- raise_exception('a message must not hold ' + mark) -}}
    {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- for message in turns -%}
  {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('after at most one system message, user and assistant take turns, the user first') -}}
  {%- elif message['role'] == 'user' -%}
    {{- bos_token + ' [INST] ' + ((system if loop.first else '') + message['content']).strip() + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
""".strip()


class Llama2(ModelFamily):
    """Everything whose config.json says `llama`: its architecture, and the peculiarities of its tokenizer."""

    name: ClassVar[str] = "llama2"
    summary: ClassVar[str] = "Llama 2 in 7b, 13b and 70b, with and without chat, and a tiny one for trying things out"
    names: ClassVar[tuple[str, ...]] = (*HUB_IDS, TINY)
    content_version: ClassVar[str] = "1"  # of what `build` writes: raised with any change of its bytes

    def hub_id(self, name: str) -> str | None:
        return HUB_IDS.get(name)

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llama"

    def size(self, config: Mapping[str, Any]) -> ModelSize:
        """Exact for all of transformers' Llama options. KeyError where config.json lacks a size."""
        hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        heads = config["num_attention_heads"]
        key_value_heads = config.get("num_key_value_heads") or heads
        head = config.get("head_dim") or hidden // heads
        attention_matrices = 2 * hidden * heads * head + 2 * hidden * key_value_heads * head  # q and o, k and v
        feed_forward_matrices = 3 * hidden * inner  # gate, up, down
        biases = (heads * head + 2 * key_value_heads * head + hidden) if config.get("attention_bias") else 0
        biases += (2 * inner + hidden) if config.get("mlp_bias") else 0
        layers = config["num_hidden_layers"]
        matrices = layers * (attention_matrices + feed_forward_matrices)
        embedding = vocabulary * hidden
        output = 0 if config.get("tie_word_embeddings") else embedding
        norms = (2 * layers + 1) * hidden
        return ModelSize(
            parameters=embedding + output + matrices + layers * biases + norms,
            matmul_parameters=matrices + embedding,  # the output layer is a product, its weights shared or not
        )

    def build(self, name: str, folder: Path) -> None:
        from llmft_plugins.models import tiny

        if name != TINY:
            raise ValueError(f"{name} is downloaded, not built")
        tiny.build(folder)

    def learning_rate(self, name: str) -> float:
        # The tiny one starts from random weights, and must learn something in some fifty steps.
        return 2e-3 if name == TINY else 2e-5

    def load_tokenizer(self, folder: Path) -> Any:
        """A tokenizer whose ids are sentencepiece's, and for which text after an added token is the text as written.

        InputError where the folder has no tokenizer."""
        if (folder / "tokenizer.json").is_file():
            from transformers import AutoTokenizer

            return without_spurious_spaces(AutoTokenizer.from_pretrained(folder))
        if (folder / "tokenizer.model").is_file():
            return from_sentencepiece(folder / "tokenizer.model")
        raise InputError(
            f"{folder}: no tokenizer (tokenizer.json, or Llama's sentencepiece tokenizer.model): "
            "copy it there, or name one with --model.tokenizer FOLDER"
        )

    def chat_template(self, tokenizer: Any) -> str:
        """Meta's, in place of the one in Llama 2's exports, whose ids differ from Meta's by a space, and for base
        models, which have none; other models of this architecture (Llama 3) keep their own."""
        own = super().chat_template(tokenizer)
        if own:
            return CHAT_TEMPLATE if "<<SYS>>" in own and "[INST]" in own else own
        return CHAT_TEMPLATE if (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>") else ""


def from_sentencepiece(model: Path) -> Any:
    """A `LlamaTokenizer` from Llama's `tokenizer.model`, with sentencepiece's ids.

    Only a text that begins with a space differs: sentencepiece puts one more before it, transformers does not.

    transformers' own conversion orders merges by id, not by score, and so splits every eighth text of GSM8K in another
    way; it also leaves out the beginning-of-sequence token. InputError where the file is not of Llama's kind.
    """
    import json

    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    way_out = "use the tokenizer.json of the same model, or name another with --model.tokenizer FOLDER"
    try:
        original = SentencePieceProcessor(model_file=str(model))
    except RuntimeError as error:  # Llama 3's file of that name is no sentencepiece model
        raise InputError(f"{model}: not a sentencepiece model; {way_out}") from error
    pieces = [original.id_to_piece(index) for index in range(original.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, [(piece, original.get_score(index)) for index, piece in enumerate(pieces)])
    settings: dict[str, Any] = {}
    config = model.with_name("tokenizer_config.json")
    if config.is_file():
        known = json.loads(config.read_text(encoding="utf-8"))
        settings = {key: known[key] for key in ("model_max_length", "chat_template") if known.get(key)}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=pieces[original.unk_id()],
        bos_token=pieces[original.bos_id()],
        eos_token=pieces[original.eos_id()],
        legacy=False,
        add_bos_token=True,
        **settings,
    )
    tokenizer.init_kwargs["legacy"] = False
    for probe in PROBES:  # a unigram model, or one with a normalizer of its own, would differ here
        if tokenizer(probe, add_special_tokens=False)["input_ids"] != original.encode(probe):
            raise InputError(f"{model}: a sentencepiece model, but not of Llama's kind; {way_out}")
    return tokenizer


def without_spurious_spaces(tokenizer: Any) -> Any:
    """Mends the older behaviour in which text after an added token gets a space that nobody wrote (`▁inform`).

    Exports say `legacy: true` or put the space there by a normalizer. It changes nothing at the start of a text, and
    tokenizers of another kind (Llama 3's bytes) are left alone.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None and normalizer_steps(backend) == ["Prepend", "Replace"]:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    elif not isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        return tokenizer
    elif backend.pre_tokenizer.prepend_scheme == "always":
        split = backend.pre_tokenizer.split
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=split)
    tokenizer.legacy = False
    tokenizer.init_kwargs["legacy"] = False  # for `save_pretrained`, which otherwise forgets it
    return tokenizer


def normalizer_steps(backend: Any) -> list[str]:
    """The kinds of a Rust tokenizer's normalizers, in order; they can only be seen in its JSON."""
    import json

    if backend.normalizer is None:
        return []
    state = json.loads(backend.normalizer.__getstate__())
    return [step["type"] for step in state.get("normalizers", [state])]


@hookimpl
def llmft_model_families() -> list[type[ModelFamily]]:
    return [Llama2]
