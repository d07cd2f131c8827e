"""llama-2-tiny: few weights and a small vocabulary in Llama's architecture, always the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmft_plugins.models import words

VOCABULARY = 4096  # ids, the specials and the 256 bytes among them
SEED = 20_000
SPREAD = 0.02 * 3**0.5  # half the width of a uniform distribution with Llama's standard deviation of 0.02

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 352,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCABULARY,
}

# How a calculation is written in a worked answer, to teach the tokenizer its punctuation; digits never join.
CALCULATIONS = """
36/2 = <<36/2=18>>18. So 5 * 3 = $<<5*3=15>>15. He has 20 - 4 = <<20-4=16>>16 left, and 7 + 9 = <<7+9=16>>16.
There are 2*3=<<2*3=6>>6 of them (half of 12). It costs $4.50 x 2 = $<<4.5*2=9>>9, 25% off.
In all: $100-$30 = $<<100-30=70>>70
"That's 10," she said; "isn't it?" 1/2 of 3/4 is 3 / 8. It's .5 * 8 = <<.5*8=4>>4 - 1-hour, 5-year-old.
#### 18
10,000 + 2,500 = <<10000+2500=12500>>12,500; (3+4)*2 = <<(3+4)*2=14>>14. $5/hour * 8 = $<<5*8=40>>40!
5% = $<<5*.01=.05>>.05
"""


def build(folder: Path) -> None:
    """Write config, weights and tokenizer into an existing folder, in about a second."""
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False})
    tokenizer().save_pretrained(folder)
    _write_weights(folder / "model.safetensors")


def tokenizer() -> Any:
    """A `LlamaTokenizer` with a vocabulary of its own: byte-pair encoding with word boundaries and byte fallback."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Words, runs of punctuation and single digits, each with the space before it; nothing grows across them.
    trained.pre_tokenizer = pre_tokenizers.Split(
        Regex("▁?[A-Za-z']+|▁?[0-9]|▁?[^A-Za-z'0-9▁]+|▁"), "removed", invert=True
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=_alphabet(), show_progress=False
    )
    trained.train_from_iterator(_corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    if len(model["vocab"]) != VOCABULARY:
        raise RuntimeError(
            f"the tiny tokenizer has {len(model['vocab'])} ids, not {VOCABULARY}: its corpus is too small"
        )
    made = LlamaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        legacy=False,
        add_bos_token=True,
        model_max_length=CONFIG["max_position_embeddings"],
    )
    made.init_kwargs["legacy"] = False  # what `save_pretrained` writes; transformers 4 takes a missing one for true
    return made


def _alphabet() -> list[str]:
    return ["▁", *(chr(code) for code in range(33, 127))]


def _corpus() -> Iterator[str]:
    """Words, each as often as it is common (so that common words become one id first), and calculations."""
    for listing, common in ((words.FUNCTION_WORDS, 400), (words.NOUNS, 160), (words.VERBS, 160), (words.NAMES, 80)):
        for rank, word in enumerate(listing.split()):
            times = 6 + common * 40 // (40 + rank)
            yield from _repeated(word, times)
            if listing is words.NOUNS:
                yield from _repeated(_plural(word), times * 2 // 3)
            if listing is words.VERBS:
                for form in (_plural(word), _with_ending(word, "ed"), _with_ending(word, "ing")):
                    yield from _repeated(form, times // 2)
            if listing is words.FUNCTION_WORDS:  # the first word of a sentence, and of a line: no space before it
                yield from _repeated(word.capitalize(), times // 3)
                yield from _repeated(word.capitalize(), times // 8, before="")
    for word in words.IRREGULAR.split():
        yield from _repeated(word, 40)
    for ending in words.ENDINGS.split():
        yield ending * 2  # without a space before it: for words that are not in the lists
    for line in CALCULATIONS.split("\n"):
        yield from _repeated(line.replace(" ", "▁"), 40, before="")


def _repeated(word: str, times: int, before: str = "▁") -> Iterator[str]:
    for _ in range(times):
        yield before + word


def _plural(word: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}es" if re.search(r"(s|x|ch|sh)$", word) else f"{word}s"


def _with_ending(word: str, ending: str) -> str:
    if ending == "ed" and re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ied"
    return f"{word.removesuffix('e')}{ending}"


def _write_weights(path: Path) -> None:
    """Random weights from the raw bits of PCG64 by exact operations, so that every machine gets the same bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    bits = np.random.PCG64(SEED)
    tensors = {}
    for name, shape in _shapes().items():
        if len(shape) == 1:  # the scale of a norm
            tensors[name] = np.ones(shape, dtype=np.float32)
            continue
        count = shape[0] * shape[1]
        fractions = (bits.random_raw(count) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)  # [0, 1)
        tensors[name] = ((fractions * 2 - 1) * np.float32(SPREAD)).reshape(shape)
    save_file(tensors, path, metadata={"format": "pt"})


def _shapes() -> dict[str, tuple[int, ...]]:
    """Parameters by name, in the model's own order."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{projection}.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (VOCABULARY, hidden)
    return shapes


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
