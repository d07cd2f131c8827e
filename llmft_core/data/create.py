"""The rows of a format with tags as files of `chat-tags`: train.jsonl, test.jsonl and tokens.json.

What is written is read again, row by row, by the format that will read it: a row whose text holds one of the tags
would come back as another row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llmft_core.catalog import Catalog
from llmft_core.data.chat import roles_of
from llmft_core.data.checks import parse_row
from llmft_core.data.sources import SplitSource
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.extensions import DatasetFormat, Split
from llmft_core.values import Conversation, Origin, Role, RowProblem

READER = "chat-tags"
SHOWN = 20


@dataclass
class Created:
    """What was written: file → rows, or tokens for tokens.json; and the flags beside the folder's own that `llmft run`
    needs to read it as the first format does."""

    files: dict[Path, int] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)


@dataclass
class _Refused:
    """Rows that cannot be written: the first are kept, all are counted."""

    first: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, origin: Origin, problem: RowProblem) -> None:
        self.count += 1
        if self.count <= SHOWN:
            where = f"{origin}: {problem.field}" if problem.field else str(origin)
            self.first.append(Problem(where, problem.reason))

    def raise_any(self) -> None:
        if self.count:
            shown = f"; the first {SHOWN}" if self.count > SHOWN else ""
            raise Problems(self.first, f"rows that cannot be written with tags: {self.count}{shown}:")


def create(dataset: DatasetFormat, sources: Mapping[Split, SplitSource], catalog: Catalog, out: Path) -> Created:
    """Write the files into `out`, all of them or none.

    Raises InputError: a file is there already, the format has no tags; Problems: rows that cannot be used, or that tags
    cannot say.
    """
    paths: dict[str, Path] = {split: out / f"{split}.jsonl" for split in sources}
    paths["tokens"] = out / "tokens.json"
    if there := [str(path) for path in paths.values() if path.exists()]:
        raise InputError(f"--out: {', '.join(there)} exists: name another folder, or remove it; nothing is overwritten")
    roles = _roles(dataset, sources["train"])
    content, reader = _declared(dataset, roles, catalog)
    created = Created()
    refused = _Refused()
    partial = {name: path.with_name(f"{path.name}.partial") for name, path in paths.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            for split, source in sources.items():
                file = files.enter_context(partial[split].open("w", encoding="utf-8", newline="\n"))
                created.files[paths[split]] = _write_split(source, file, dataset, roles, reader, refused)
        refused.raise_any()
        partial["tokens"].write_text(content, encoding="utf-8", newline="\n")
        created.files[paths["tokens"]] = len(dataset.special_tokens)
        for name, path in paths.items():
            os.replace(partial[name], path)
    except OSError as error:
        raise InputError(f"--out: cannot write to {out}: {error.strerror or error}; name another folder") from error
    finally:
        for path in partial.values():
            if path.exists():
                path.unlink()
    created.flags = reader.flags(roles)
    return created


def _roles(dataset: DatasetFormat, source: SplitSource) -> dict[str, Role]:
    """Role → its tags. Raises InputError where a format's rows cannot be written with tags."""
    roles = dataset.roles
    if not roles:
        parsed = (row if isinstance(row, RowProblem) else dataset.parse(row) for _, row in source.rows())
        first = next((row for row in parsed if isinstance(row, Conversation)), None)
        roles = roles_of(first) if first else ()
    if not roles or not any(role.opening for role in roles):
        raise InputError(
            f"the rows of {dataset.name} have no tags of their own, which {READER} is made of (chats are written in "
            "each model's own template): they are trained as they are"
        )
    for role in roles:
        if bool(role.opening) != bool(role.closing):
            raise InputError(
                f"{dataset.name} writes {role.opening or role.closing} around the role {role.name} on one side only; "
                f"{READER} needs an opening and a closing tag"
            )
    return {role.name: role for role in roles}


class _Reader:
    """`chat-tags` as it will read what is written: once without objections, once with those of its default options."""

    def __init__(self, catalog: Catalog, content: str) -> None:
        lenient = {"outside": "context", "unknown-tags": "text"}
        self._lenient: DatasetFormat = catalog.create("dataset", {"name": READER, **lenient})
        self._inside: DatasetFormat = catalog.create("dataset", {"name": READER, "unknown-tags": "text"})
        self._declared: DatasetFormat = catalog.create("dataset", {"name": READER, "outside": "context"})
        for reader in (self._lenient, self._inside, self._declared):
            reader.read_companion("tokens.json", content.encode())
        self._refused: dict[str, None] = {}

    @property
    def roles(self) -> tuple[Role, ...]:
        """Those that it derives."""
        return self._lenient.roles

    def read(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        """What the row will be."""
        if isinstance(self._inside.parse(row), RowProblem):
            self._refused["--dataset.outside context"] = None
        if isinstance(self._declared.parse(row), RowProblem):
            self._refused["--dataset.unknown-tags text"] = None
        return self._lenient.parse(row)

    def flags(self, wanted: Mapping[str, Role]) -> list[str]:
        """Flags without which a run would refuse a row that was read, or train another role."""
        trained = {role.opening for role in wanted.values() if role.trained}
        if trained == {role.opening for role in self.roles if role.trained}:
            return list(self._refused)
        names = ",".join(role.name for role in self.roles if role.opening in trained)
        return [*self._refused, f"--data.train-on {names}"]


def _declared(dataset: DatasetFormat, roles: Mapping[str, Role], catalog: Catalog) -> tuple[str, _Reader]:
    """tokens.json, as short as it can be, and its reader."""
    pairs = {name: [role.opening, role.closing] for name, role in roles.items() if role.opening}
    tokens = list(dataset.special_tokens)
    plain = json.dumps({"tokens": tokens}, ensure_ascii=False) + "\n"
    try:
        reader = _Reader(catalog, plain)
        if sorted([role.opening, role.closing] for role in reader.roles) == sorted(pairs.values()):
            return plain, reader
    except InputError:
        pass  # the names alone do not say what belongs together
    paired = {tag for pair in pairs.values() for tag in pair}
    single = [token for token in tokens if token not in paired]
    full = {"tokens": tokens, "roles": pairs, **({"single": single} if single else {})}
    content = json.dumps(full, ensure_ascii=False) + "\n"
    return content, _Reader(catalog, content)


def _write_split(
    source: SplitSource,
    file: IO[str],
    dataset: DatasetFormat,
    roles: Mapping[str, Role],
    reader: _Reader,
    refused: _Refused,
) -> int:
    """Returns how many rows there are; what cannot be written is added to `refused`."""
    count = 0
    for origin, row in source.rows():
        parsed = row if isinstance(row, RowProblem) else parse_row(dataset, row, origin)
        if isinstance(parsed, Conversation):
            text = "".join(message.opening + message.text + message.closing for message in parsed.messages)
            problem = _unsaid(parsed, reader.read({"input": text}), roles)
            if problem is None:
                file.write(json.dumps({"input": text}, ensure_ascii=False) + "\n")
                count += 1
                continue
            parsed = problem
        refused.add(origin, parsed)
    return count


def _unsaid(meant: Conversation, read: Conversation | RowProblem, roles: Mapping[str, Role]) -> RowProblem | None:
    """Why a row would not be the same when it is read again."""
    for message in meant.messages:
        if message.role in roles and message.trained != roles[message.role].trained:
            return RowProblem(message.role, "is trained in one message and not in another, which tags cannot say")
    if isinstance(read, Conversation) and list(_pieces(meant)) == list(_pieces(read)):
        return None
    tags = [tag for role in roles.values() for tag in (role.opening, role.closing) if tag]
    for message in meant.messages:
        if held := next((tag for tag in tags if tag in message.text), None):
            return RowProblem(message.role, f"holds {held} as text, which would be read as a tag")
    return RowProblem("", f"would be read as another row ({read.reason if isinstance(read, RowProblem) else 'cut'})")


def _pieces(conversation: Conversation) -> Iterator[tuple[str, bool]]:
    """(text or tag, whether it is a tag), neighbouring texts joined."""
    text = ""
    for message in conversation.messages:
        for piece, is_tag in ((message.opening, True), (message.text, False), (message.closing, True)):
            if is_tag and piece:
                if text:
                    yield text, False
                yield piece, True
                text = ""
            elif not is_tag:
                text += piece
    if text:
        yield text, False
