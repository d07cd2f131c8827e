"""What can go wrong, in words for users: each message names the thing, the alternatives and the next action."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


class LlmftError(Exception):
    """A run failed for a reason that a user can act on. Printed as one line without a traceback; exit code 1."""

    exit_code = 1


class InputError(LlmftError):
    """What the user gave was wrong: a flag, a file, a bucket, a plugin. Nothing has been started; exit code 2."""

    exit_code = 2


class ChangedMeanwhile(LlmftError):
    """A file in storage is no longer the one that a transfer began with: what was read so far is worthless."""


class UselessWeights(LlmftError):
    """What was trained is not worth publishing: to train on would be wasted too."""


class Interrupted(LlmftError):
    """The user stopped the run; exit code 130 (128 + SIGINT)."""

    exit_code = 130


class Terminated(Interrupted):
    """SIGTERM stopped the run, as schedulers do before they kill; exit code 143 (128 + SIGTERM)."""

    exit_code = 143


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input.

    `path` is the flag and YAML key it belongs to (`storage.bucket`), or the file and line of a row;
    `reason` says what is wrong, what is allowed and what to do, in one line.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason


class Problems(InputError):
    """Several problems, found together and reported together."""

    def __init__(self, problems: Sequence[Problem], heading: str = "") -> None:
        self.problems = tuple(problems)
        self.heading = heading
        super().__init__("\n".join([heading, *map(str, problems)] if heading else map(str, problems)))


def one_line(error: BaseException) -> str:
    """An error and its notes as one line, white space folded."""
    return " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def system_words(error: BaseException) -> str:
    """What the operating system said, where an error came from that (`[Errno 111] Connection refused`); else nothing.
    Clients of stores wrap it in long words of their own."""
    said = [str(link) for link in error_chain(error) if isinstance(link, OSError) and link.errno is not None]
    return said[-1] if said else ""


def close_match(word: str, candidates: Iterable[str]) -> str:
    """` (did you mean X?)` for a likely typo, else nothing.

    >>> close_match("zero3", ["ddp", "zero-3"])
    ' (did you mean zero-3?)'
    """
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""
