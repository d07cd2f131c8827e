"""How rows of a dataset become conversations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llmft_core.extensions.base import Extension
from llmft_core.options import Options, comma_separated
from llmft_core.values import Conversation, Role, RowProblem

Split = Literal["train", "test"]


class SourceOptions(Options):
    """Options of a dataset that is read from files: its format inherits them."""

    source: str = Field(
        "", description="folder or URI with train.jsonl and test.jsonl, or a hub id; default: the format's own hub id"
    )
    train: Annotated[list[str], BeforeValidator(comma_separated)] = Field(
        [], description="files, folders, globs or URIs with the training rows (A,B), instead of a source; repeatable"
    )
    test: Annotated[list[str], BeforeValidator(comma_separated)] = Field(
        [],
        description="files, folders, globs or URIs with the test rows (A,B), instead of a source; repeatable",
    )


class DatasetFormat(Extension, ABC):
    """How rows become conversations. The core owns sources, line numbers, error reports, tokens and caches."""

    special_tokens: tuple[str, ...] = ()
    """Tokens this format writes as `opening` or `closing`; each becomes one id of the tokenizer, in this order."""
    roles: tuple[Role, ...] = ()
    """The roles its rows may have, where it knows them all beforehand: `--data.train-on` is checked against them
    before a row is read, and the chat template of a checkpoint knows them all. Empty: the first row shows its roles."""
    companions: ClassVar[Mapping[str, str]] = {}
    """Small files that say how rows are read: name beside the rows → the option that names a file elsewhere
    (`{"tokens.json": "tokens"}`)."""
    companion_digests: Mapping[str, str] = {}
    """SHA-256 of each companion as it was read. Set by the core."""
    keys: ClassVar[tuple[str, ...]] = ()
    """All keys that a row may have: another one is an error. Empty: `parse` says which ones it cannot use."""
    hub_files: Mapping[Split, str] = {}
    """Files of the splits in a hub repository (`main/train-00000-of-00001.parquet`, or a glob), where there is one."""
    hub_id: ClassVar[str] = ""
    """The hub repository that is read when no source is given."""

    @abstractmethod
    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        """A conversation, or what is wrong with the row. Messages that should be trained by default say so."""

    def may_hold_rows(self, file_name: str) -> bool:
        """Whether a file of a folder may be one of its own, by the name: for a dataset of which several versions lie in
        one folder. Files that the user names are not asked about."""
        return True

    def read_companion(self, name: str, content: bytes) -> None:
        """Take in one of its `companions`: called once for each, before any row is parsed and before `special_tokens`
        and `roles` are looked at, both of which it may set on the instance. The instance is pickled as it then is.
        Raises InputError with what is wrong in it, without the file's name, which the core puts before it."""
        raise TypeError(f"dataset format {self.name} names {name} as a companion, but does not read it")

    def generate(self, split: Split) -> Iterator[dict[str, Any]] | None:
        """Rows that are made up rather than read (deterministically from the options), or None: read the source."""
        return None
