"""Dialogues with tags: what is read out of a text, and what is said of one that cannot be used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_tokenizers import byte_level_tokenizer

from llmft_core import Conversation, InputError, Message, RowProblem
from llmft_core.data.encode import Encoder, EncoderRecipe
from llmft_plugins.datasets.chat_tags import ChatTags, ChatTagsOptions

SEED = ["<ASSISTANT>", "</ASSISTANT>", "<USER>", "</USER>"]


def tagged(tokens: list[str] = SEED, options: dict[str, str] | None = None, **declared: Any) -> ChatTags:
    dataset = ChatTags(ChatTagsOptions.model_validate(options or {}))
    dataset.read_companion("tokens.json", json.dumps({"tokens": tokens, **declared}).encode())
    return dataset


def parse(text: str, dataset: ChatTags | None = None) -> Conversation | RowProblem:
    return (dataset or tagged()).parse({"input": text})


def messages(text: str, dataset: ChatTags | None = None) -> list[tuple[str, str, str, str, bool]]:
    found = parse(text, dataset)
    assert isinstance(found, Conversation), found
    return [(m.role, m.opening, m.text, m.closing, m.trained) for m in found.messages]


def reason(text: str, dataset: ChatTags | None = None) -> str:
    found = parse(text, dataset)
    assert isinstance(found, RowProblem), found
    assert found.field == "input"
    return found.reason


# --- rows ---------------------------------------------------------------------------------------------------------


def test_the_seed_systems_row() -> None:
    assert parse("<USER>how is the weather?</USER><ASSISTANT>Sunny.</ASSISTANT>") == Conversation(
        (
            Message("USER", "how is the weather?", False, "<USER>", "</USER>"),
            Message("ASSISTANT", "Sunny.", True, "<ASSISTANT>", "</ASSISTANT>"),
        )
    )
    assert tagged().special_tokens == tuple(SEED)
    assert tagged().keys == ("input",)


def test_tags_in_any_number_and_order() -> None:
    text = "<ASSISTANT>Hi.\n</ASSISTANT><USER> a </USER><USER>b</USER><ASSISTANT>c</ASSISTANT>"
    assert [(role, said) for role, _, said, _, _ in messages(text)] == [
        ("ASSISTANT", "Hi.\n"),
        ("USER", " a "),
        ("USER", "b"),
        ("ASSISTANT", "c"),
    ]


@pytest.mark.parametrize(
    ("opening", "closing", "name"),
    [
        ("<USER>", "</USER>", "USER"),
        ("[INST]", "[/INST]", "INST"),
        ("<|user|>", "<|/user|>", "user"),
        ("<|user|>", "</|user|>", "user"),
        ("<START_Q>", "<END_Q>", "Q"),
        ("<|im_start|>", "<|im_end|>", "im"),
        ("<q_begin>", "<q_end>", "q"),
        ("<Open-Q>", "<Close-Q>", "Q"),
        ("<START>", "<END>", "START"),
        ("<用户>", "</用户>", "用户"),
        ("{.*+?^$(x)|\\d}", "{/.*+?^$(x)|\\d}", ""),
        ("(?P<a>a)", "(?P</a>a)", ""),
        ("USER", "/USER", "USER"),
    ],
)
def test_any_names(opening: str, closing: str, name: str) -> None:
    if not name:  # signs that mean something in patterns: the pair has to be named
        dataset = tagged([opening, closing], roles={"x": [opening, closing]})
        name = "x"
    else:
        dataset = tagged([closing, opening])
    assert messages(f"{opening}text{closing}", dataset) == [(name, opening, "text", closing, True)]


def test_one_tag_may_begin_like_another() -> None:
    tokens = ["<A>", "</A>", "<A><B>", "</A><B>"]
    dataset = tagged(tokens, roles={"a": ["<A>", "</A>"], "ab": ["<A><B>", "</A><B>"]})
    assert messages("<A><B>x</A><B><A>y</A>", dataset) == [
        ("ab", "<A><B>", "x", "</A><B>", False),
        ("a", "<A>", "y", "</A>", True),
    ]


def test_tokens_that_stand_alone() -> None:
    dataset = tagged([*SEED, "<SEP>"], single=["<SEP>"])
    text = "<USER>a<SEP>b</USER><SEP><ASSISTANT><SEP>c<SEP>d</ASSISTANT><SEP>"
    assert messages(text, dataset) == [
        ("USER", "<USER>", "a", "<SEP>", False),
        ("USER", "", "b", "</USER>", False),
        ("outside", "", "", "<SEP>", False),
        ("ASSISTANT", "<ASSISTANT>", "", "<SEP>", True),
        ("ASSISTANT", "", "c", "<SEP>", True),
        ("ASSISTANT", "", "d", "</ASSISTANT>", True),
        ("outside", "", "", "<SEP>", False),
    ]


def test_text_outside_of_tags_is_an_error_or_context() -> None:
    text = "Answer.\n<USER>a</USER> <ASSISTANT>b</ASSISTANT>\n"
    assert reason(text) == (
        "has text outside of tags: 'Answer.\\n' at character 1; remove it, or keep it as context with "
        "--dataset.outside context"
    )
    assert reason("<USER>a</USER><ASSISTANT>b</ASSISTANT>\n").startswith(
        "has text outside of tags: '\\n' at character 39;"
    )
    assert messages(text, tagged(options={"outside": "context"})) == [
        ("outside", "", "Answer.\n", "", False),
        ("USER", "<USER>", "a", "</USER>", False),
        ("outside", "", " ", "", False),
        ("ASSISTANT", "<ASSISTANT>", "b", "</ASSISTANT>", True),
        ("outside", "", "\n", "", False),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<USER>a", "has a tag that is not closed: <USER> at character 1; </USER> is missing"),
        (
            "<USER>a<ASSISTANT>b</ASSISTANT>",
            "has a tag that is not closed: <USER> of character 1; </USER> is missing before <ASSISTANT> at character 8",
        ),
        ("</USER>", "has a closing tag too many: </USER> at character 1 closes nothing"),
        ("<USER>a</USER></USER>", "has a closing tag too many: </USER> at character 15 closes nothing"),
        (
            "<USER>a</ASSISTANT>",
            "has a wrong closing tag: </ASSISTANT> at character 8, where </USER> would close <USER> of character 1",
        ),
        (
            "<USER>a<ASSISTANT>b</USER>c</ASSISTANT>",
            "has crossed tags: <ASSISTANT> at character 8 opens inside <USER> of character 1 and is closed after it",
        ),
        (
            "<USER>a<ASSISTANT>b</ASSISTANT>c</USER>",
            "has nested tags: <ASSISTANT> at character 8 opens inside <USER> of character 1",
        ),
        ("<USER>a<USER>b</USER>", "has nested tags: <USER> at character 8 opens inside <USER> of character 1"),
        ("<USER>a</USER><ASSISTANT></ASSISTANT>", "has an empty span: <ASSISTANT> at character 15 holds no text"),
        ("<USER> \n</USER><ASSISTANT>b</ASSISTANT>", "has an empty span: <USER> at character 1 holds no text"),
        (
            "<USER>a</USR><ASSISTANT>b</ASSISTANT>",
            "has an unknown tag: </USR> at character 8 (did you mean </USER>?); declare it in tokens.json, or take it "
            "for text with --dataset.unknown-tags text",
        ),
        (
            "<USER>a</USER><assistant>b</assistant>",
            "has an unknown tag: <assistant> at character 15 (did you mean <ASSISTANT>?); declare it in tokens.json, "
            "or take it for text with --dataset.unknown-tags text",
        ),
        ("plain", "has text outside of tags: 'plain' at character 1; remove it, or keep it as context with"),
    ],
)
def test_a_row_that_cannot_be_used_names_tag_and_place(text: str, expected: str) -> None:
    assert reason(text).startswith(expected)


@pytest.mark.parametrize(
    "said", ["a <b>bold</b> 3 < 4 > 2", "<<48/2=24>>24", "Vec<T> is <T>", "</USR", "< USER >", "<>"]
)
def test_what_is_text(said: str) -> None:
    dataset = tagged(options={"unknown-tags": "text"} if "<T>" in said else {})
    assert messages(f"<USER>{said}</USER><ASSISTANT>b</ASSISTANT>", dataset)[0][2] == said


def test_an_unknown_tag_may_be_text() -> None:
    text = "<USER>a</USR></USER><ASSISTANT>b</ASSISTANT>"
    assert messages(text, tagged(options={"unknown-tags": "text"}))[0][2] == "a</USR>"
    # Tags in small letters cannot be told from other markup by their looks.
    assert reason("<user>a <b>x</b></user>", tagged(["<user>", "</user>"])).startswith("has an unknown tag: <b> at")


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({}, "input", "is missing; the row has no fields"),
        ({"inputs": "x"}, "input", "is missing; the row has inputs"),
        ({"input": None}, "input", "is NoneType, not text"),
        ({"input": " \n"}, "input", "is empty"),
    ],
)
def test_a_row_of_another_shape(row: dict[str, Any], field: str, expected: str) -> None:
    assert tagged().parse(row) == RowProblem(field, expected)


# --- tokens.json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "trained"),
    [
        (SEED, "ASSISTANT"),
        (["<START_Q>", "<END_Q>", "<START_A>", "<END_A>"], "A"),
        (["<Question>", "</Question>", "<Answer>", "</Answer>"], "Answer"),
        (["<TEXT>", "</TEXT>"], "TEXT"),
        (["<X>", "</X>", "<Y>", "</Y>"], None),
        ([*SEED, "<BOT>", "</BOT>"], None),
    ],
)
def test_which_role_is_learnt(tokens: list[str], trained: str | None) -> None:
    assert [role.name for role in tagged(tokens).roles if role.trained] == ([trained] if trained else [])


def test_what_servers_call_the_roles() -> None:
    roles = tagged(["<SYS>", "</SYS>", "<HUMAN>", "</HUMAN>", "<BOT>", "</BOT>"]).roles
    assert [(role.name, role.served_as) for role in roles] == [
        ("SYS", "system"),
        ("HUMAN", "user"),
        ("BOT", "assistant"),
    ]
    assert [role.served_as for role in tagged(["<X>", "</X>", "<Q>", "</Q>", "<USER>", "</USER>"]).roles] == [""] * 3


def test_pairs_that_cannot_be_told_from_their_names() -> None:
    dataset = tagged(["<U>", "<A>", "<E>"], roles={"user": ["<U>", "<E>"], "assistant": ["<A>", "<E>"]})
    assert messages("<U>a<E><A>b<E>", dataset) == [
        ("user", "<U>", "a", "<E>", False),
        ("assistant", "<A>", "b", "<E>", True),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "line 1: is not valid JSON: Expecting value (column 1); write {"),
        ('{"tokens": ["<A>"', "line 1: is not valid JSON: Expecting ',' delimiter (column 18)"),
        (b"\xff", "is not UTF-8 text (byte 1): save it as UTF-8"),
        ("[]", "has no tokens; write {"),
        ("{}", "has no tokens; write {"),
        ('{"tokens": [], "tokens": []}', "tokens is given twice"),
        ('{"tokens": []}', "tokens is empty; write {"),
        ('{"tokens": "<A>"}', 'tokens is no list of texts; write "tokens": ["<USER>", …]'),
        ('{"tokens": ["<A>", 1]}', "tokens is no list of texts"),
        ('{"tokens": ["<A>", "<A>"]}', "tokens: <A> is given twice"),
        ('{"tokens": [""]}', "tokens: '' is no tag"),
        ('{"tokens": [" <A>"]}', "tokens: ' <A>' is no tag"),
        ('{"tokens": ["<\\n>"]}', "tokens: '<\\n>' is no tag"),
        ('{"tokens": ["\\ud800"]}', "tokens: '\\ud800' is no tag"),
        ('{"tokens": ["<A>", "</A>"], "specials": []}', "specials: no such key; there are tokens, single, roles"),
        ('{"tokens": ["<A>", "</B>"]}', "<A> has no partner (such as </A>): add it to tokens, declare <A> as one that"),
        ('{"tokens": ["<A>", "</A>", "</B>"]}', "</B> has no partner (such as a closing tag)"),
        (
            '{"tokens": ["<START_A>", "<END_A>", "</START_A>"]}',
            "<START_A> may be closed by </START_A> and <END_A>: say which under roles",
        ),
        (
            '{"tokens": ["<A>", "</A>", "[A]", "[/A]"]}',
            "<A> and [A] would both be the role A: name them under roles",
        ),
        ('{"tokens": ["<SEP>"], "single": ["<SEP>"]}', "no role can be made of <SEP>: write pairs of tags"),
        ('{"tokens": ["<A>", "</A>"], "single": ["<SEP>"]}', "single: <SEP> is not among the tokens: add it to them"),
        ('{"tokens": ["<A>"], "roles": []}', 'roles is no object; write "roles": {'),
        ('{"tokens": ["<A>"], "roles": {"a": ["<A>", "</A>"]}}', "roles: a: </A> is not among the tokens"),
        ('{"tokens": ["<A>"], "roles": {"a": ["<A>"]}}', "roles: a needs two tags"),
        ('{"tokens": ["<A>"], "roles": {"a": ["<A>", "<A>"]}}', "roles: a: <A> must open this role and nothing else"),
        ('{"tokens": ["<A>", "<B>"], "roles": {"a,b": ["<A>", "<B>"]}}', "roles: 'a,b' cannot be written as --data"),
        (
            '{"tokens": ["<A>", "</A>"], "roles": {"a": ["<A>", "</A>"]}, "single": ["<A>"]}',
            "<A> is declared under roles and under single: leave one of them out",
        ),
        (
            '{"tokens": ["<A>", "</A>", "<U>", "<E>"], "roles": {"A": ["<U>", "<E>"]}}',
            "roles: A is declared there and derived from <A>: rename one of them",
        ),
    ],
)
def test_a_tokens_file_that_cannot_be_used(content: str | bytes, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatTags(ChatTagsOptions()).read_companion(
            "tokens.json", content if isinstance(content, bytes) else content.encode()
        )
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_obstacle() -> None:
    dataset = ChatTags(ChatTagsOptions())
    dataset.read_companion("tokens.json", b"\xef\xbb\xbf" + json.dumps({"tokens": SEED}).encode())
    assert dataset.special_tokens == tuple(SEED)


# --- properties ---------------------------------------------------------------------------------------------------

PIECES = [*SEED, "<SEP>", "</USR>", "<b>", "a", " ", "\n", "é😀", "<", "</", ">"]
spans = st.lists(
    st.tuples(st.sampled_from(["USER", "ASSISTANT"]), st.text(min_size=1, max_size=12).filter(str.strip)), min_size=1
)


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(["error", "context"]))
def test_no_text_is_lost(text: str, outside: str) -> None:
    """What is read, written again, is the text; whatever else is a problem in one line."""
    options = {"outside": outside, "unknown-tags": "text"}
    found = parse(text, tagged([*SEED, "<SEP>"], options, single=["<SEP>"]))
    if isinstance(found, RowProblem):
        assert found.reason
        assert "\n" not in found.reason
        return
    assert "".join(m.opening + m.text + m.closing for m in found.messages) == text
    for message in found.messages:
        assert not any(tag in message.text for tag in [*SEED, "<SEP>"])


@settings(deadline=None)
@given(spans)
def test_well_formed_rows_are_read_as_they_were_written(turns: list[tuple[str, str]]) -> None:
    assume(not any(tag in said for _, said in turns for tag in SEED))
    text = "".join(f"<{role}>{said}</{role}>" for role, said in turns)
    found = parse(text, tagged(options={"unknown-tags": "text"}))
    assert isinstance(found, Conversation)
    assert [(message.role, message.text) for message in found.messages] == turns


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = byte_level_tokenizer()
    made.add_tokens([*SEED, "<SEP>"], special_tokens=True)
    return made


safe = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10).filter(str.strip)


def test_trained_ids_are_the_answers_and_their_ends(tokenizer: Any) -> None:
    dataset = tagged([*SEED, "<SEP>"], {"unknown-tags": "text"}, single=["<SEP>"])

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(["USER", "ASSISTANT"]), safe, safe), min_size=1, max_size=4))
    def check(turns: list[tuple[str, str, str]]) -> None:
        text = "".join(f"<{role}>{one}<SEP>{two}</{role}>" for role, one, two in turns)
        row = parse(text, dataset)
        assert isinstance(row, Conversation)
        (example,) = Encoder(EncoderRecipe.of(tokenizer, "completion", 10_000, "error")).encode_many([row])
        answers = [f"{one}<SEP>{two}</ASSISTANT>" for role, one, two in turns if role == "ASSISTANT"]
        if not answers:
            assert example == RowProblem("", "nothing in it is trained (--data.train-on completion)")
            return
        assert not isinstance(example, RowProblem)
        assert tokenizer.decode([label for label in example.labels if label != -100]) == "".join(answers)
        assert list(example.input_ids) == tokenizer(text)["input_ids"]

    check()


def test_it_pickles_with_what_it_read(tmp_path: Path) -> None:
    dataset = tagged()
    again = pickle.loads(pickle.dumps(dataset))
    assert again.special_tokens == dataset.special_tokens
    text = "<USER>a</USER><ASSISTANT>b</ASSISTANT>"
    assert again.parse({"input": text}) == dataset.parse({"input": text})
