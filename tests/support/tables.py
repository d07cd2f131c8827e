"""Token tables in memory and tiny random models, for tests of training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from llmft_core.data.tables import TokenTable


class ListTable(TokenTable):
    """A TokenTable from lists of (ids, labels), in memory."""

    def __init__(self, rows: list[tuple[list[int], list[int]]]) -> None:
        self.ids = np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in rows])
        self.trained = np.concatenate([np.array(labels) != -100 for _, labels in rows]).astype(np.uint8)
        self.offsets = np.cumsum([0, *(len(ids) for ids, _ in rows)])
        self.lines = np.arange(1, len(rows) + 1, dtype=np.int32)
        self.files = np.zeros(len(rows), dtype=np.uint16)
        self.sources = ("table",)


class InMemory:
    """Prepared data as the loop sees it: tables of rows that an epoch passes over once."""

    def __init__(self, train: TokenTable, test: TokenTable | None = None) -> None:
        self.train, self.test = train, test
        self.report = SimpleNamespace(splits={"train": SimpleNamespace(weights=(1.0,))})


def random_table(rows: int, vocabulary: int, longest: int, seed: int = 0) -> ListTable:
    """Rows of very different lengths of which different shares are trained."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        length = int(random.integers(3, longest + 1))
        ids = random.integers(3, vocabulary, length).tolist()
        prompt = int(random.integers(1, length))
        made.append((ids, [-100] * prompt + ids[prompt:]))
    return ListTable(made)


def tiny_llama(folder: Path, vocabulary: int = 97, seed: int = 0, **settings: object) -> Path:
    """A random Llama-2 with two layers, written as a Hugging Face folder without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            **settings,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
