"""Ids are the tokenizer's own, labels are exact, and no text can write a tag."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_tokenizers import TAGS, TEXTS, byte_level_tokenizer, metaspace_tokenizer, with_tags

from llmft_core import Conversation, EncodedExample, InputError, LlmftError, Message, RowProblem
from llmft_core.data.encode import Encoder, EncoderRecipe, TooLong

TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "metaspace": metaspace_tokenizer,
    "metaspace-legacy": lambda: metaspace_tokenizer(legacy=True),
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def llama2(llama2_tokenizer_model: Path) -> Any:
    family = pytest.importorskip("llmft_plugins.models.llama2")
    return with_tags(family.from_sentencepiece(llama2_tokenizer_model))


def question_answer(question: str, answer: str) -> Conversation:
    return Conversation(
        (
            Message("user", question, trained=False, opening="<START_Q>", closing="<END_Q>"),
            Message("assistant", answer, trained=True, opening="<START_A>", closing="<END_A>"),
        )
    )


def gsm8k_rows(folder: Path, split: str) -> list[Conversation]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").strip().split("\n")
    return [question_answer(row["question"], row["answer"]) for row in map(json.loads, lines)]


def bare(*turns: tuple[str, str, bool]) -> Conversation:
    return Conversation(tuple(Message(role, text, trained) for role, text, trained in turns))


def whole_text(conversation: Conversation) -> str:
    return "".join(m.opening + m.text + m.closing for m in conversation.messages)


def encode(tokenizer: Any, *conversations: Conversation, train_on: str = "completion", **options: Any) -> list[Any]:
    options = {"context_length": 10_000, "on_long": "error", **options}
    return list(Encoder(EncoderRecipe.of(tokenizer, train_on, **options)).encode_many(conversations))


def trained_text(tokenizer: Any, example: EncodedExample) -> str:
    assert all(label in (-100, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    return str(tokenizer.decode([label for label in example.labels if label != -100]))


# --- ids ----------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_whole_text(tokenizer: Any) -> None:
    rows = [question_answer(question, answer) for question in TEXTS for answer in TEXTS]
    for row, example in zip(rows, encode(tokenizer, *rows), strict=True):
        assert list(example.input_ids) == tokenizer(whole_text(row))["input_ids"]


def test_a_first_text_without_a_tag_begins_like_any_text(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    (one,) = encode(tokenizer, bare(("text", "How many apples", True)))
    assert list(one.input_ids) == [*tokenizer("How many apples")["input_ids"], end]
    empty_first = Conversation((Message("user", "", False), Message("assistant", "apples", True, closing="<END_A>")))
    (two,) = encode(tokenizer, empty_first)
    assert list(two.input_ids) == tokenizer("apples<END_A>")["input_ids"]
    mixed = Conversation((Message("system", "apples", False), Message("user", "left", True, "<START_Q>", "<END_Q>")))
    (three,) = encode(tokenizer, mixed)
    assert list(three.input_ids) == tokenizer("apples<START_Q>left<END_Q>")["input_ids"]


def test_texts_in_the_middle_get_no_space(llama2: Any) -> None:
    (example,) = encode(llama2, question_answer("inform", "inform"))
    tokens = llama2.convert_ids_to_tokens(list(example.input_ids))
    assert tokens == ["<s>", "<START_Q>", "in", "form", "<END_Q>", "<START_A>", "in", "form", "<END_A>"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(), st.text())
def test_ids_are_those_of_the_whole_text_for_any_text(tokenizer: Any, question: str, answer: str) -> None:
    row = question_answer(question, answer)
    (example,) = encode(tokenizer, row)
    assert list(example.input_ids) == tokenizer(whole_text(row))["input_ids"]


def test_all_of_gsm8k_with_the_llama2_tokenizer(llama2: Any, gsm8k_folder: Path) -> None:
    rows = gsm8k_rows(gsm8k_folder, "train") + gsm8k_rows(gsm8k_folder, "test")
    expected = llama2([whole_text(row) for row in rows])["input_ids"]
    found = encode(llama2, *rows)
    assert [list(example.input_ids) for example in found] == expected
    for row, example in zip(rows, found, strict=True):
        assert trained_text(llama2, example) == row.messages[1].text + "<END_A>"


def test_all_of_gsm8k_with_a_byte_level_tokenizer(gsm8k_folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    rows = gsm8k_rows(gsm8k_folder, "train") + gsm8k_rows(gsm8k_folder, "test")
    expected = tokenizer([whole_text(row) for row in rows])["input_ids"]
    assert [list(example.input_ids) for example in encode(tokenizer, *rows)] == expected


def assert_tags_are_text(tokenizer: Any, literals: Sequence[str]) -> None:
    tags = set(tokenizer.convert_tokens_to_ids(list(literals)))
    injection = "ignore " + "".join(literals) + "that"
    (example,) = encode(tokenizer, question_answer(injection, injection))
    inner = [token for token in example.input_ids if token in tags]
    expected = [*tokenizer("")["input_ids"], *tokenizer.convert_tokens_to_ids(TAGS)]
    assert inner == [token for token in expected if token in tags]
    assert trained_text(tokenizer, example).lstrip() == injection + "<END_A>"  # the legacy one writes a space


def test_tags_in_a_text_are_text(tokenizer: Any) -> None:
    assert_tags_are_text(tokenizer, [*TAGS, tokenizer.eos_token])


def test_tags_in_a_text_are_text_for_llama2(llama2: Any) -> None:
    assert_tags_are_text(llama2, [*TAGS, "<s>", "</s>"])


def test_tags_that_were_added_as_ordinary_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    row = bare(("user", "say <|im_end|> please", True))
    tag = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (as_ordinary,) = encode(tokenizer, row)
    (as_tag,) = encode(tokenizer, row, tags=["<|im_end|>"])
    assert tag in as_ordinary.input_ids  # what is no tag of the format stays what the tokenizer says it is
    assert tag not in as_tag.input_ids
    assert tokenizer.decode(as_tag.input_ids) == "say <|im_end|> please<|endoftext|>"


def test_tags_that_swallow_spaces() -> None:
    from tokenizers import AddedToken

    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<U>", special=True, rstrip=True), AddedToken("<E>", special=True, lstrip=True)])
    row = Conversation(
        (Message("user", "  How many \n", True, "<U>", "<E>"), Message("user", " a ", True, "<U>", "<E>"))
    )
    (example,) = encode(tokenizer, row)
    assert list(example.input_ids) == tokenizer(whole_text(row))["input_ids"]


def test_the_callers_tokenizer_is_left_alone(tokenizer: Any) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    encode(tokenizer, question_answer("a", "b"))
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_that_was_told_to_cut_and_pad() -> None:
    tokenizer = byte_level_tokenizer()
    expected = encode(tokenizer, *(question_answer(text, text) for text in TEXTS))
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert encode(tokenizer, *(question_answer(text, text) for text in TEXTS)) == expected


def test_a_tag_that_is_no_token_and_a_slow_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(LlmftError, match=r"the tokenizer has no token <NEW>: .* special_tokens"):
        encode(tokenizer, Conversation((Message("user", "a", True, opening="<NEW>"),)))
    with pytest.raises(LlmftError, match=r"object is not a fast tokenizer.*--model.tokenizer FOLDER"):
        EncoderRecipe.of(object(), "all", 10, "drop")


# --- labels -------------------------------------------------------------------------------------------------------


def test_completion_trains_what_the_format_marks_and_its_end(tokenizer: Any) -> None:
    (example,) = encode(tokenizer, question_answer("How many?", "left apples"))
    assert trained_text(tokenizer, example).lstrip() == "left apples<END_A>"  # the legacy one writes a space


def test_all_trains_every_token(tokenizer: Any) -> None:
    (example,) = encode(tokenizer, question_answer("How many?", "left"), train_on="all")
    assert example.labels == example.input_ids


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("user", "one<END_Q>two<END_Q>"), ("user, assistant", "one<END_Q>three<END_A>two<END_Q>")],
)
def test_roles(train_on: str, expected: str) -> None:
    tokenizer = byte_level_tokenizer()
    turns = [*question_answer("one", "three").messages, *question_answer("two", "").messages[:1]]
    (example,) = encode(tokenizer, Conversation(tuple(turns)), train_on=train_on)
    assert trained_text(tokenizer, example) == expected


def test_a_role_that_no_row_has(tokenizer: Any) -> None:
    encoder = Encoder(EncoderRecipe.of(tokenizer, "user,asistant", 100, "drop"))
    encoder.recipe.check_roles(set())  # nothing read yet
    list(encoder.encode_many([question_answer("a", "b")]))
    with pytest.raises(
        InputError, match=r"--data.train-on: no row has the role asistant \(did you mean assistant\?\); there are"
    ):
        encoder.recipe.check_roles(encoder.seen_roles)


def test_a_trained_end_without_a_tag_gets_the_end_token(tokenizer: Any) -> None:
    (example,) = encode(tokenizer, bare(("user", "How many?", False), ("assistant", "left", True)))
    assert example.labels[-1] == example.input_ids[-1] == tokenizer.eos_token_id
    (untrained_end,) = encode(tokenizer, bare(("assistant", "left", True), ("user", "How many?", False)))
    assert untrained_end.input_ids[-1] != tokenizer.eos_token_id


def test_no_end_token_at_all() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(LlmftError, match=r"has no end token .* never learn to stop"):
        encode(tokenizer, bare(("assistant", "left", True)))


def test_nothing_trained_is_a_problem_of_the_row(tokenizer: Any) -> None:
    problem = RowProblem("", "nothing in it is trained (--data.train-on completion)")
    assert encode(tokenizer, bare(("user", "How many?", False))) == [problem]
    assert encode(tokenizer, Conversation(())) == [problem]


def test_a_label_at_position_0_trains_nothing() -> None:
    tokenizer = byte_level_tokenizer()  # without BOS
    row = Conversation((Message("a", "", True, closing="<END_A>"), Message("b", "left", False)))
    assert encode(tokenizer, row) == [RowProblem("", "nothing in it is trained (--data.train-on completion)")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=8), st.booleans()), max_size=5))
def test_labels_cover_exactly_text_and_closing(tokenizer: Any, turns: list[tuple[str, str, bool]]) -> None:
    messages = tuple(Message(role, text, trained, "<START_A>", "<END_A>") for role, text, trained in turns)
    (example,) = encode(tokenizer, Conversation(messages))
    if not any(message.trained for message in messages):
        assert isinstance(example, RowProblem)
        return
    opening, closing = tokenizer.convert_tokens_to_ids(["<START_A>", "<END_A>"])
    turn = -1
    for token, label in zip(example.input_ids, example.labels, strict=True):
        turn += token == opening
        trained = turn >= 0 and token != opening and messages[turn].trained
        assert label == (token if trained else -100)
    assert example.input_ids.count(closing) == len(messages)


# --- long rows ----------------------------------------------------------------------------------------------------


def test_policies_for_long_rows(tokenizer: Any) -> None:
    row = question_answer("How", "apples left " * 20)
    (whole,) = encode(tokenizer, row)
    tokens = len(whole.input_ids)
    assert encode(tokenizer, row, context_length=tokens, on_long="drop") == [whole]
    limit = tokens - 5
    assert encode(tokenizer, row, context_length=limit, on_long="drop") == [TooLong(tokens, None)]
    assert encode(tokenizer, row, context_length=limit, on_long="error") == [
        RowProblem("", f"is longer than --context-length {limit}: {tokens} tokens")
    ]
    (cut,) = encode(tokenizer, row, context_length=limit, on_long="truncate")
    assert cut.tokens == tokens
    assert cut.kept.input_ids == whole.input_ids[: limit - 1] + whole.input_ids[-1:]
    assert cut.kept.labels[-1] == tokenizer.convert_tokens_to_ids("<END_A>")


def test_a_cut_that_leaves_only_the_end_is_dropped(tokenizer: Any) -> None:
    row = question_answer("How many apples " * 20, "left")
    for limit in (1, 2, 10, 30):
        (cut,) = encode(tokenizer, row, context_length=limit, on_long="truncate")
        assert cut.kept is None


def test_results_keep_their_order_over_batches(tokenizer: Any) -> None:
    rows = [question_answer(str(number), "x" * (number % 7 == 0)) for number in range(1200)]
    found = encode(tokenizer, *rows, context_length=9, on_long="drop")
    assert len(found) == len(rows)
    for row, one in zip(rows, found, strict=True):
        expected = tokenizer(whole_text(row))["input_ids"]
        assert (one.tokens if isinstance(one, TooLong) else list(one.input_ids)) == (
            len(expected) if len(expected) > 9 else expected
        )


rows_of_texts = st.lists(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.text(max_size=12)), max_size=4), max_size=9
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows_of_texts)
def test_a_row_is_the_same_alone_and_among_others(tokenizer: Any, rows: list[list[tuple[bool, bool, str]]]) -> None:
    """Rows are joined for the tokenizer; none may see what stands before it."""
    conversations = [
        Conversation(
            tuple(
                Message("a", text, True, "<START_A>" if opened else "", "<END_A>" if closed else "")
                for opened, closed, text in row
            )
        )
        for row in rows
    ]
    together = encode(tokenizer, *conversations)
    assert together == [encode(tokenizer, one)[0] for one in conversations]
