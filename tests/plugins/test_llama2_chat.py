"""Chats for Llama 2, id for id as Meta's own code writes them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmft_core import Conversation, Message, RowProblem
from llmft_core.data.chat_template import ChatTemplate
from llmft_core.data.encode import Encoder, EncoderRecipe
from llmft_core.options import Options
from llmft_plugins.models.llama2 import CHAT_TEMPLATE, Llama2, from_sentencepiece

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"

Dialog = list[dict[str, str]]


class Reference:
    """What `llama/generation.py` and `llama/tokenizer.py` of Meta's repository do with a dialog, for dialogs that end
    with an answer as well."""

    def __init__(self, model: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model = SentencePieceProcessor(model_file=str(model))

    def encode(self, text: str, eos: bool) -> list[int]:
        ids: list[int] = [self.model.bos_id(), *self.model.encode(text)]
        return [*ids, self.model.eos_id()] if eos else ids

    def ids(self, dialog: Dialog) -> list[int]:
        if dialog[0]["role"] == "system":
            first = B_SYS + dialog[0]["content"] + E_SYS + dialog[1]["content"]
            dialog = [{"role": dialog[1]["role"], "content": first}, *dialog[2:]]
        found: list[int] = []
        for prompt, answer in zip(dialog[::2], dialog[1::2], strict=False):
            text = f"{B_INST} {prompt['content'].strip()} {E_INST} {answer['content'].strip()} "
            found += self.encode(text, eos=True)
        if dialog[-1]["role"] == "user":
            found += self.encode(f"{B_INST} {dialog[-1]['content'].strip()} {E_INST}", eos=False)
        return found


@pytest.fixture(scope="module")
def reference(llama2_tokenizer_model: Path) -> Reference:
    return Reference(llama2_tokenizer_model)


@pytest.fixture(scope="module")
def tokenizer(llama2_tokenizer_model: Path) -> Any:
    made = from_sentencepiece(llama2_tokenizer_model)
    made.chat_template = Llama2(Options()).chat_template(made)
    return made


def conversation(dialog: Dialog) -> Conversation:
    return Conversation(
        tuple(Message(turn["role"], turn["content"], turn["role"] == "assistant") for turn in dialog), template=True
    )


@cache
def tools(tokenizer: Any) -> tuple[ChatTemplate, Encoder]:
    """Made once: a third of a second, for each takes the whole vocabulary with it."""
    recipe = EncoderRecipe.of(tokenizer, "completion", 100_000, "error")
    return ChatTemplate.of(tokenizer, tokenizer.chat_template), Encoder(recipe)


def encode(tokenizer: Any, dialogs: list[Dialog]) -> list[Any]:
    template, encoder = tools(tokenizer)
    rows = [template.literal(conversation(dialog), "completion") for dialog in dialogs]
    assert [row for row in rows if isinstance(row, RowProblem)] == []
    return list(encoder.encode_many(rows))  # type: ignore[arg-type]


def turns(*texts: str, system: str = "") -> Dialog:
    roles = ["user", "assistant"] * len(texts)
    dialog = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *dialog] if system else dialog


def assert_as_meta(tokenizer: Any, reference: Reference, dialogs: list[Dialog]) -> None:
    for dialog, example in zip(dialogs, encode(tokenizer, dialogs), strict=True):
        assert list(example.input_ids) == reference.ids(dialog)
        answers = [index for index, turn in enumerate(dialog) if turn["role"] == "assistant"]
        expected = [-100] * len(example.input_ids)
        for index in answers:  # from where the prompt ends to where the answer does
            start, end = len(reference.ids(dialog[:index])), len(reference.ids(dialog[: index + 1]))
            expected[start:end] = example.input_ids[start:end]
        assert list(example.labels) == expected


def test_all_of_gsm8k_as_dialogs(tokenizer: Any, reference: Reference, gsm8k_folder: Path) -> None:
    dialogs = []
    for split in ("train", "test"):
        for line in (gsm8k_folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            dialogs.append(turns(row["question"], row["answer"]))
    assert len(dialogs) == 8792
    assert_as_meta(tokenizer, reference, dialogs)


def test_several_turns_with_a_system_message(tokenizer: Any, reference: Reference, gsm8k_folder: Path) -> None:
    rows = [json.loads(line) for line in (gsm8k_folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [text for row in rows for text in (row["question"], row["answer"])]
    dialogs = [
        turns(*texts[start : start + 6], system="Solve it.\nStep by step. " if start % 4 else "")
        for start in range(0, 600, 2)
    ]
    assert_as_meta(tokenizer, reference, dialogs)


HOSTILE = [
    "</s>",
    "<s> x",
    "<unk>",
    "  two  spaces ",
    "\n\nlines\n",
    "é – 日本語 😀",
    "inform",
    "[INS",
    "<<SYS>",
    "\u2581",
    "0",
]


def test_hostile_texts(tokenizer: Any, reference: Reference) -> None:
    dialogs = [turns(text, text, text, text, system=text) for text in HOSTILE]
    dialogs += [turns(text, text) for text in HOSTILE]
    assert_as_meta(tokenizer, reference, dialogs)


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(text.filter(str.strip), min_size=2, max_size=6), st.booleans())
def test_any_text(tokenizer: Any, reference: Reference, texts: list[str], with_system: bool) -> None:
    texts = texts[: len(texts) // 2 * 2]
    assert_as_meta(tokenizer, reference, [turns(*texts, system=texts[0] if with_system else "")])


def test_a_server_prompts_with_the_same_ids(tokenizer: Any, reference: Reference, tmp_path: Path) -> None:
    """Through the template that is saved with a checkpoint, by transformers alone."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    for dialog in (turns("How many?"), turns(" a ", "b\n", "c", system="Be brief.")):
        ids = served.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        assert ids == reference.ids(dialog)


@pytest.mark.parametrize(
    ("dialog", "reason"),
    [
        (turns("say [/INST] please", "no"), "a message must not hold [/INST]"),
        (turns("a", "<<SYS>>"), "a message must not hold <<SYS>>"),
        (turns("a", "b")[1:], "after at most one system message, user and assistant take turns, the user first"),
        ([*turns("a")[:1], *turns("a", "b")], "after at most one system message, user and assistant take turns"),
        ([*turns("a", "b"), {"role": "system", "content": "x"}, *turns("a", "b")], "after at most one system message"),
    ],
)
def test_what_metas_code_refuses_is_refused(tokenizer: Any, dialog: Dialog, reason: str) -> None:
    found = ChatTemplate.of(tokenizer, CHAT_TEMPLATE).literal(conversation(dialog), "completion")
    assert isinstance(found, RowProblem)
    assert found.reason.startswith(f"is refused by the model's chat template: {reason}")


def test_which_models_get_it(tokenizer: Any) -> None:
    family = Llama2(Options())
    exported = "{{ bos_token + '[INST] ' + '<<SYS>>\\n' }}"
    for own, expected in ((None, CHAT_TEMPLATE), (exported, CHAT_TEMPLATE), ("{{ 'llama 3' }}", "{{ 'llama 3' }}")):
        tokenizer.chat_template = own
        assert family.chat_template(tokenizer) == expected
    tokenizer.chat_template = CHAT_TEMPLATE
