"""The contract suite of dataset formats. Needs pytest and hypothesis.

class TestMyFormat(DatasetFormatContract):
    @pytest.fixture
    def extension(self):
        return MyFormat(MyOptions())

    @pytest.fixture
    def rows(self):
        return [{"question": "2 + 3?", "answer": "5"}]
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft_core.errors import InputError
from llmft_core.extensions import DatasetFormat, SourceOptions
from llmft_core.testing.contracts import ExtensionContract
from llmft_core.values import Conversation, RowProblem

SPOILT: list[Any] = [None, 7, 0.5, True, "", "x", " \n", [], [None], ["x"], {}, {"x": None}, [{}], b"\xff"]
"""What stands in a field by mistake."""
WRONG_FILES = [b"", b"\xff\xfe", b"{", b"[]", b"{}", b"null", b'"x"', b"[" * 100_000]
"""What a companion is by mistake."""

# What a file of rows can hold: JSON, and dates and bytes from tables.
_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary() | st.datetimes()
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


class DatasetFormatContract(ExtensionContract):
    """Fixtures: `extension`, without its companions read; `companions`, their bytes by name (default: none); `rows`,
    good rows as a reader yields them (default: what the format generates); `broken_rows`, rows that cannot be used
    (default: none beside those that the suite makes itself)."""

    @pytest.fixture
    def companions(self) -> dict[str, bytes]:
        """What lies beside the rows."""
        return {}

    @pytest.fixture
    def dataset(self, extension: DatasetFormat, companions: dict[str, bytes]) -> DatasetFormat:
        """The format as the core uses it: its companions read. Not to be overridden."""
        assert set(companions) == set(extension.companions), "override the fixture `companions`: a file each"
        for name, content in companions.items():
            extension.read_companion(name, content)
        return extension

    @pytest.fixture
    def rows(self, dataset: DatasetFormat) -> list[dict[str, Any]]:
        """At least one good row."""
        generated = dataset.generate("train")
        if generated is None:
            raise NotImplementedError("override the fixture `rows`: return a few good rows, as they lie in a file")
        return list(islice(generated, 20))

    @pytest.fixture
    def broken_rows(self) -> list[dict[str, Any]]:
        """Rows that `parse` must refuse."""
        return []

    # --- good rows ------------------------------------------------------------------------------------------------

    def test_a_good_row_becomes_a_conversation(self, dataset: DatasetFormat, rows: list[dict[str, Any]]) -> None:
        assert rows
        for conversation in _conversations(dataset, rows):
            assert isinstance(conversation.messages, tuple)
            assert conversation.messages
            assert all(message.role for message in conversation.messages)
            if any(role.trained for role in dataset.roles) or not dataset.roles:
                assert any(message.trained for message in conversation.messages), "nothing in it would be trained"

    def test_what_is_trained_ends(self, dataset: DatasetFormat, rows: list[dict[str, Any]]) -> None:
        """With a token of its own, or with the row: a model that sees no end never stops."""
        for conversation in _conversations(dataset, rows):
            if conversation.template:
                continue
            for message, following in zip(conversation.messages, conversation.messages[1:], strict=False):
                goes_on = following.trained and following.role == message.role and not following.opening
                assert not message.trained or message.closing or goes_on, "a trained message in the middle has no end"

    def test_tags_are_special_tokens(self, dataset: DatasetFormat, rows: list[dict[str, Any]]) -> None:
        for conversation in _conversations(dataset, rows):
            for message in conversation.messages:
                written = {message.opening, message.closing} - {""}
                assert written <= set(dataset.special_tokens)
                assert not (written and conversation.template), "the model's template writes the tokens of a chat"

    def test_special_tokens_are_distinct(self, dataset: DatasetFormat) -> None:
        assert isinstance(dataset.special_tokens, tuple)
        assert len(set(dataset.special_tokens)) == len(dataset.special_tokens)
        assert all(token and token == token.strip() for token in dataset.special_tokens)

    def test_roles_are_those_of_the_rows(self, dataset: DatasetFormat, rows: list[dict[str, Any]]) -> None:
        """Where the format says its roles."""
        roles = {role.name: role for role in dataset.roles}
        assert len(roles) == len(dataset.roles)
        for role in dataset.roles:
            assert {role.opening, role.closing} <= {"", *dataset.special_tokens}
            assert role.served_as in ("", "system", "user", "assistant")
        if roles:
            for conversation in _conversations(dataset, rows):
                for message in conversation.messages:
                    assert not message.trained or message.role in roles
                    assert message.role not in roles or message.opening in ("", roles[message.role].opening)

    def test_parse_is_a_pure_function(self, dataset: DatasetFormat, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            before = copy.deepcopy(row)
            assert dataset.parse(row) == dataset.parse(row)
            assert row == before

    def test_it_travels_to_worker_processes(self, dataset: DatasetFormat, rows: list[dict[str, Any]]) -> None:
        """Pickled, with what it made of its companions."""
        again = pickle.loads(pickle.dumps(dataset))
        assert again.special_tokens == dataset.special_tokens
        assert again.roles == dataset.roles
        assert [again.parse(row) for row in rows] == [dataset.parse(row) for row in rows]

    # --- rows that cannot be used -----------------------------------------------------------------------------------

    def test_an_empty_row_is_a_problem_not_an_exception(self, dataset: DatasetFormat) -> None:
        problem = dataset.parse({})
        assert isinstance(problem, RowProblem)
        assert problem.field
        _assert_readable(problem)

    def test_a_broken_row_is_a_problem(self, dataset: DatasetFormat, broken_rows: list[dict[str, Any]]) -> None:
        for row in broken_rows:
            problem = dataset.parse(row)
            assert isinstance(problem, RowProblem), row
            assert problem.field
            _assert_readable(problem)

    def test_a_spoilt_row_never_raises(self, dataset: DatasetFormat, rows: list[dict[str, Any]]) -> None:
        """Every value of every good row, however deep, is missing or something else once."""
        for row in rows:
            for path in _paths(row):
                for spoilt in [*({"value": value} for value in SPOILT), {}]:
                    result = dataset.parse(_changed(row, path, **spoilt))
                    assert isinstance(result, (Conversation, RowProblem))
                    if isinstance(result, RowProblem):
                        _assert_readable(result)

    def test_parse_never_raises(self, dataset: DatasetFormat, rows: list[dict[str, Any]]) -> None:
        """Whatever stands in a row."""
        keys = st.sampled_from([key for row in rows for key in row]) | st.text(max_size=8)
        places = st.sampled_from([(index, path) for index, row in enumerate(rows) for path in _paths(row)])

        @settings(deadline=None, database=None)
        @given(st.dictionaries(keys, _values, max_size=4), places, _values)
        def check(row: dict[str, Any], place: tuple[int, Sequence[Any]], value: Any) -> None:
            index, path = place
            for each in (row, _changed(rows[index], path, value=value)):
                result = dataset.parse(each)
                assert isinstance(result, (Conversation, RowProblem))
                if isinstance(result, RowProblem):
                    _assert_readable(result)

        check()

    # --- where rows and tags come from ------------------------------------------------------------------------------

    def test_a_companion_can_be_elsewhere(self, extension: DatasetFormat) -> None:
        """By the option that it is declared with."""
        for name, option in extension.companions.items():
            assert "/" not in name
            assert option in extension.options_type.model_fields
            assert isinstance(getattr(extension.options, option), str)

    def test_a_wrong_companion_is_one_line(self, extension: DatasetFormat) -> None:
        for name in extension.companions:
            for content in WRONG_FILES:
                with pytest.raises(InputError) as caught:
                    type(extension)(extension.options).read_companion(name, content)
                assert str(caught.value)
                assert "\n" not in str(caught.value)

    def test_generated_rows_are_the_same_each_time(self, extension: DatasetFormat) -> None:
        if extension.generate("train") is None:
            assert issubclass(extension.options_type, SourceOptions), "what is read from files inherits SourceOptions"
            return
        for split in ("train", "test"):
            again = type(extension)(extension.options)
            first, second = extension.generate(split), again.generate(split)
            assert first is not None
            assert second is not None
            assert list(islice(first, 100)) == list(islice(second, 100))

    def test_a_hub_repository_says_where_its_rows_are(self, extension: DatasetFormat) -> None:
        assert not extension.hub_id or "train" in extension.hub_files
        assert set(extension.hub_files) <= {"train", "test"}


def _conversations(dataset: DatasetFormat, rows: Sequence[Mapping[str, Any]]) -> list[Conversation]:
    parsed = [dataset.parse(row) for row in rows]
    assert [result for result in parsed if not isinstance(result, Conversation)] == [], "these rows should be good"
    return [result for result in parsed if isinstance(result, Conversation)]


def _assert_readable(problem: RowProblem) -> None:
    """One line that says something."""
    assert problem.reason
    assert "\n" not in problem.field + problem.reason


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside another."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def _changed(row: Mapping[str, Any], path: Sequence[Any], **new: Any) -> dict[str, Any]:
    """A copy in which the value at the end of the path is `value`, or missing."""
    changed = copy.deepcopy(dict(row))
    inside: Any = changed
    for key in path[:-1]:
        inside = inside[key]
    if "value" in new:
        inside[path[-1]] = new["value"]
    else:
        del inside[path[-1]]
    return changed
