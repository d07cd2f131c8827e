"""Which files of a folder are the rows of a split, and what a glob matches."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmft_core.data.files import SUFFIXES, is_uri, place_of
from llmft_core.errors import InputError
from llmft_core.extensions import Split

if TYPE_CHECKING:
    from llmft_core.storage.places import Places

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d+)")


def rows_of_split(names: Sequence[str], split: Split, whose: str) -> list[str]:
    """Of a folder's file names those with the rows of a split: `train.jsonl`, or shards (`train_1.jsonl.gz`,
    `train-00000-of-00002.parquet`). Raises InputError, which begins with `whose`, where it is not plain which ones are
    meant, and where a shard is missing."""
    types = "|".join(re.escape(suffix) for suffix in SUFFIXES)
    wanted = re.compile(rf"(?P<stem>{split}(?:[^A-Za-z/][^/]*?)?)(?P<type>{types})")
    found = {name: match for name in sorted(names) if (match := wanted.fullmatch(name))}
    plain = [name for name, match in found.items() if match["stem"] == split]
    kinds = {match["type"]: name for name, match in found.items()}
    doubtful = list(found)[:2] if plain and len(found) > 1 else list(kinds.values()) if len(kinds) > 1 else []
    if doubtful:
        raise InputError(
            f"{whose} has {' and '.join(doubtful)}: choose with --dataset.{split} FILE, or a pattern for several"
        )
    _check_whole([match["stem"] for match in found.values()], whose, split)
    return list(found)


def _check_whole(stems: Sequence[str], whose: str, split: Split) -> None:
    """Shards that are numbered `-00000-of-00002` are all there."""
    shards = [match for stem in stems if (match := _SHARD.fullmatch(stem))]
    sets = {(match["stem"], match["total"]) for match in shards}
    if len(sets) > 1 or (shards and len(shards) < len(stems)):
        raise InputError(
            f"{whose} has {' and '.join(sorted(stems)[:: max(1, len(stems) - 1)])}, which are not shards of one set: "
            f"choose with --dataset.{split} FILE, or a pattern for several"
        )
    for stem, total in sets:
        missing = sorted(set(range(int(total))) - {int(match["number"]) for match in shards})
        if missing:
            number = str(missing[0]).zfill(len(total))
            raise InputError(
                f"{whose}: {stem}-{number}-of-{total} is missing ({len(shards)} of {int(total)} are there)"
            )


def is_pattern(item: str) -> bool:
    """Whether it has one of a glob's characters."""
    return any(character in item for character in "*?[")


def expand(pattern: str, places: Places | None, names: Sequence[str] | None = None) -> list[str]:
    """What a glob matches, sorted: of `names` where they are given, else local files, or those of a URI's store."""
    if names is None and not is_uri(pattern):
        from pathlib import Path

        return sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if names is not None:
        return _matching(pattern, names)
    from llmft_core.storage.transfer import list_files

    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if is_pattern(part))
    folder = "/".join(parts[:fixed])
    below = _matching("/".join(parts[fixed:]), list(list_files(place_of(places, folder))))
    return [f"{folder}/{name}" for name in below]


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """A glob as Python's `glob` reads it: `*` and `?` stay in their folder and find no hidden file, `**/` is any
    folders."""
    pieces = re.findall(r"\*\*/|\*|\?|\[!?\]?[^\]]*\]|[^*?\[]+|\[", pattern)
    words = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
    wanted = re.compile("".join(words.get(piece) or _class(piece) for piece in pieces))
    hidden = re.compile(r"(?:.*/)?\..*")
    found = [name for name in names if wanted.fullmatch(name)]
    return sorted(name for name in found if hidden.fullmatch(pattern) or not hidden.fullmatch(name))


def _class(piece: str) -> str:
    """`[abc]`, `[!abc]`, or text as it is."""
    if piece[0] != "[" or len(piece) == 1:
        return re.escape(piece)
    inner = piece[1:-1].replace("\\", r"\\")
    return f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
