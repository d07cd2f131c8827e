"""Small tokenizers of the two usual kinds, trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TAGS = ["<START_Q>", "<END_Q>", "<START_A>", "<END_A>"]
TEXTS = [
    "How many apples are left?",
    " Two  spaces,\n\nlines and\ttabs ",
    "48/2 = <<48/2=24>>24 clips",
    "naïve café – 日本語 😀",
    "#### 72",
]


def save_toy_tokenizer(folder: Path, entries: int = 3) -> None:
    """A tokenizer of a few words, in the two files that every checkpoint has."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "how": 1, "many": 2, **{f"word{number}": number for number in range(3, entries)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


def byte_level_tokenizer() -> Any:
    """Of GPT-2's kind: bytes, no space before the first word, no BOS, one end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    return with_tags(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"))


def metaspace_tokenizer(legacy: bool = False) -> Any:
    """Of Llama-2's kind: a space before the first word, bytes for what is unknown, BOS put in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator([text.replace("\n", " ") for text in TEXTS * 20], trainer)
    plain = json.loads(backend.to_str())
    plain["added_tokens"] = plain["added_tokens"][:3]  # the bytes are pieces of the vocabulary, not tags
    backend = Tokenizer.from_str(json.dumps(plain))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return with_tags(made)


def with_tags(tokenizer: Any) -> Any:
    tokenizer.add_tokens(TAGS, special_tokens=True)
    return tokenizer
