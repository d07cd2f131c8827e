"""The rows of each split: files from folders, globs, URIs and the hub, or a generator; what a plan's words mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from llmft_core.data.blocks import Block
from llmft_core.data.files import SUFFIXES, FileSource, GeneratedSource, is_file, is_uri, place_of
from llmft_core.data.hub import HUB_ID, HUB_SCHEME, fetch_from_hub, hub_names
from llmft_core.data.names import expand, is_pattern, rows_of_split
from llmft_core.data.rows import Row
from llmft_core.errors import InputError
from llmft_core.extensions import DatasetFormat, SourceOptions, Split
from llmft_core.values import Origin

if TYPE_CHECKING:
    from llmft_core.storage.places import Places

SPLITS: tuple[Split, ...] = ("train", "test")
TYPES = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


@dataclass(frozen=True)
class SplitSource:
    """The files of a split in their order, and how often an epoch passes over each (`--data.mix`; 1 unless given).
    `name` is what reports call them, `flag` the flag that led here."""

    name: str
    flag: str
    files: tuple[FileSource | GeneratedSource, ...]
    weights: tuple[float, ...]

    def digest(self) -> str:
        """SHA-256 that stands for the bytes of all files as they lie, in hexadecimal. Raises InputError where they
        cannot be read."""
        return joined_digest([file.digest() for file in self.files])

    def blocks(self, digest: str = "", digests: Sequence[str] = ()) -> Iterator[Block]:
        """All rows, a block after another. Raises InputError where a file cannot be read, and at the end where the
        bytes were not those of `digest`; `digests` are those of the files, where they are known."""
        read = list(digests) or ([digest] if len(self.files) == 1 else [file.digest() for file in self.files])
        if digest and joined_digest(read) != digest:
            raise InputError(f"{self.flag}: {self.name} was changed while it was read; try again")
        for index, file in enumerate(self.files):
            yield from file.blocks(index, read[index])

    def rows(self, digest: str = "") -> Iterator[tuple[Origin, Row]]:
        """Every row with its origin; what is no row is a RowProblem. Raises as `blocks`."""
        for block in self.blocks(digest):
            for line, row in block.rows():
                yield Origin(self.files[block.file].name, line), row

    def companion(self, name: str) -> bytes | None:
        """A small file that lies beside the rows (`tokens.json`), or None where there is none. Raises InputError where
        it cannot be read, and where files in several folders have different ones."""
        found: dict[str, bytes] = {}
        for file in self.files:
            folder = file.name.rpartition("/")[0] or "."
            content = None if folder in found else file.companion(name)
            if content is not None:
                found[folder] = content
        if len(set(found.values())) > 1:
            folders = " and ".join(found)
            raise InputError(f"{self.flag}: the {name} of {folders} differ: make them the same")
        return next(iter(found.values()), None)


def joined_digest(digests: Sequence[str]) -> str:
    """The digest of a split from those of its files: of a single one, its own."""
    return digests[0] if len(digests) == 1 else sha256("\n".join(digests).encode()).hexdigest()


def find_sources(dataset: DatasetFormat, places: Places | None, mix: Sequence[float] = ()) -> dict[Split, SplitSource]:
    """The sources of the splits; `test` only where there is one. `mix`: passes of an epoch over each of the training
    sources as they are given.

    Raises InputError, in one line that names the flag and what was looked for: no such folder or file, no training
    rows in it, a file type that is not read, shards of which one is missing, the hub out of reach.
    """
    made = {split: GeneratedSource(dataset, split) for split in SPLITS if dataset.generate(split) is not None}
    if "train" in made:
        _check_mix(mix, [made["train"].name])
        return {split: SplitSource(one.name, one.flag, (one,), (1.0,)) for split, one in made.items()}
    options = dataset.options if isinstance(dataset.options, SourceOptions) else SourceOptions()
    if options.source and (options.train or options.test):
        raise InputError(
            "--dataset.source and --dataset.train or --dataset.test: give the folder or the files, not both"
        )
    if options.test and not options.train:
        raise InputError("--dataset.test is given without training rows: add --dataset.train FILE")
    if options.train:
        found: dict[Split, SplitSource] = {}
        for split, given in zip(SPLITS, (options.train, options.test), strict=True):
            if given:
                found[split] = _given(given, split, places, mix if split == "train" else ())
        return found
    files = _split_files(dataset, options.source, places)
    _check_mix(mix, [options.source or dataset.hub_id])
    weight = mix[0] if mix else 1.0
    return {
        split: _split_source(one, "--dataset.source", [weight if split == "train" else 1.0] * len(one))
        for split, one in files.items()
    }


def _split_source(files: Sequence[FileSource], flag: str, weights: Sequence[float], name: str = "") -> SplitSource:
    first = files[0].name
    name = first if len(files) == 1 else f"{name or first.rpartition('/')[0]} ({len(files)} files)"
    return SplitSource(name, flag, tuple(files), tuple(weights))


def _check_mix(mix: Sequence[float], given: Sequence[str]) -> None:
    if mix and len(mix) != len(given):
        raise InputError(
            f"--data.mix has {len(mix)} weights for the training sources {', '.join(given)}: give one for each, in "
            "their order"
        )


def _split_files(dataset: DatasetFormat, source: str, places: Places | None) -> dict[Split, list[FileSource]]:
    """What `--dataset.source` means, or the format's own hub repository."""
    if not source and not dataset.hub_id:
        raise InputError(f"dataset {dataset.name} has no rows of its own: give them with --dataset.source FOLDER")
    if source.startswith(HUB_SCHEME):
        return _on_hub(source.removeprefix(HUB_SCHEME), dataset)
    if source and (is_uri(source) or Path(source).expanduser().exists()):
        return _in_folder(source, dataset, places)
    hub_id = source or dataset.hub_id
    if not HUB_ID.fullmatch(hub_id):
        raise InputError(f"--dataset.source: there is no folder {source}, and it is no URI and no hub id (owner/name)")
    return _on_hub(hub_id, dataset)


def _in_folder(folder: str, dataset: DatasetFormat, places: Places | None) -> dict[Split, list[FileSource]]:
    flag = "--dataset.source"
    if not is_uri(folder) and not Path(folder).expanduser().is_dir():
        raise InputError(f"{flag}: {folder} is a file: give the folder it lies in, or the file with --dataset.train")
    there = _names_in(folder, places)
    names = [name for name in there if dataset.may_hold_rows(name)]
    found: dict[Split, list[FileSource]] = {}
    for split in SPLITS:
        if chosen := rows_of_split(names, split, f"{flag}: {folder}"):
            found[split] = [_beside(folder, name, flag, places) for name in chosen]
    if "train" not in found:
        kinds = ", no ".join(f"train{suffix}" for suffix in SUFFIXES)
        others = rows_of_split([name for name in there if name not in names], "train", f"{flag}: {folder}")
        aside = f"; {others[0]} is not what {dataset.name} reads with these options" if others else ""
        raise InputError(
            f"{flag}: {folder} has no {kinds} and no shards of one{aside}; name a file with --dataset.train"
        )
    return found


def _names_in(folder: str, places: Places | None) -> list[str]:
    """Names of the files that lie directly in a folder, without hidden ones."""
    if is_uri(folder):
        from llmft_core.storage.transfer import list_names

        names = [name for name in list_names(place_of(places, folder)) if not name.endswith("/")]
    else:
        names = [path.name for path in Path(folder).expanduser().iterdir() if path.is_file()]
    return sorted(name for name in names if not name.startswith("."))


def _beside(folder: str, name: str, flag: str, places: Places | None) -> FileSource:
    location = folder.rstrip("/") if is_uri(folder) else str(Path(folder).expanduser())
    return FileSource(f"{folder.rstrip('/')}/{name}", f"{location}/{name}", flag, places)


def _given(given: Sequence[str], split: Split, places: Places | None, mix: Sequence[float]) -> SplitSource:
    """What `--dataset.train A,B` or `--dataset.test A,B` means."""
    flag = f"--dataset.{split}"
    _check_mix(mix, given)
    files: list[FileSource] = []
    weights: list[float] = []
    for number, item in enumerate(given):
        more = _files_of(item, split, flag, places)
        files += more
        weights += [mix[number] if mix else 1.0] * len(more)
    seen: set[str] = set()
    for file in files:
        if file.location in seen:
            raise InputError(f"{flag}: {file.name} is given twice: --data.mix says how often an epoch passes over it")
        seen.add(file.location)
    return _split_source(files, flag, weights, ", ".join(given))


def _files_of(item: str, split: Split, flag: str, places: Places | None) -> list[FileSource]:
    """A file, a glob, a folder, or `hf://datasets/OWNER/NAME/PATH`."""
    if item.startswith(HUB_SCHEME):
        return _hub_path(item.removeprefix(HUB_SCHEME), flag)
    location = item if is_uri(item) else str(Path(item).expanduser())
    if is_pattern(item) and (is_uri(item) or not Path(location).exists()):
        matches = expand(location, places)
        wrong = next((match for match in matches if not match.endswith(SUFFIXES)), None)
        if wrong is not None:
            raise InputError(f"{flag}: {item} matches {wrong}, which is no {TYPES} file: write a narrower pattern")
        if not matches:
            raise InputError(f"{flag}: no file matches {item}")
        return [FileSource(match, match, flag, places) for match in matches]
    if item.endswith(SUFFIXES) and is_file(location, places):
        return [FileSource(item, location, flag, places)]
    if (is_uri(item) and not item.endswith(SUFFIXES)) or Path(location).is_dir():
        names = _names_in(item, places)
        whose = f"{flag}: {item}"
        others = any(rows_of_split(names, other, whose) for other in SPLITS if other != split)
        chosen = rows_of_split(names, split, whose)
        if not chosen and not others:
            chosen = [name for name in names if name.endswith(SUFFIXES)]
        if not chosen:
            raise InputError(f"{whose} is no file with rows and no folder with {split} rows ({TYPES})")
        return [_beside(item, name, flag, places) for name in chosen]
    if not is_file(location, places):
        raise InputError(f"{flag}: there is no file {item}")
    raise InputError(f"{flag}: {item} is read neither as rows nor as a table: use a {TYPES} file")


def _hub_path(given: str, flag: str) -> list[FileSource]:
    """`OWNER/NAME/PATH` in a hub repository; the path may be a glob."""
    owner, _, rest = given.partition("/")
    name, _, path = rest.partition("/")
    hub_id = f"{owner}/{name}"
    if not HUB_ID.fullmatch(hub_id) or not path:
        raise InputError(f"{flag}: {HUB_SCHEME}{given}: write {HUB_SCHEME}OWNER/NAME/PATH-OF-A-FILE")
    paths = [path]
    if is_pattern(path):
        names, whole = hub_names(hub_id)
        if not whole:
            raise InputError(f"{flag}: {HUB_SCHEME}{given}: which files match is not known without the hub: name them")
        paths = expand(path, None, names)
    found = [_from_hub(hub_id, one, flag) for one in paths if one.endswith(SUFFIXES)]
    files = [file for file in found if file is not None]
    if not files or len(files) < len(paths):
        raise InputError(f"{flag}: the hub repository {hub_id} has no {TYPES} file {path}")
    return files


def _from_hub(hub_id: str, path: str, flag: str) -> FileSource | None:
    local = fetch_from_hub(hub_id, path)
    return FileSource(f"{HUB_SCHEME}{hub_id}/{path}", str(local), flag, None, (hub_id, path)) if local else None


def _on_hub(hub_id: str, dataset: DatasetFormat) -> dict[Split, list[FileSource]]:
    """The format's own repository has the files it says; another one has those, or what a folder would have, in its
    root or in `data/`."""
    flag = "--dataset.source"
    if hub_id == dataset.hub_id and dataset.hub_files:
        return {split: _hub_path(f"{hub_id}/{path}", flag) for split, path in dataset.hub_files.items()}
    names, whole = hub_names(hub_id)
    found: dict[Split, list[FileSource]] = {}
    for split in SPLITS:
        paths = expand(dataset.hub_files[split], None, names) if split in dataset.hub_files else []
        for folder in ("", "data/"):
            if not paths:
                inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
                paths = [folder + name for name in rows_of_split(inside, split, f"{flag}: {hub_id}")]
        if not whole and not paths:
            raise InputError(
                f"{flag}: which {split} files {hub_id} has is not known without the hub: name what the cache has with "
                f"--dataset.train {HUB_SCHEME}{hub_id}/PATH, or give a folder with --dataset.source FOLDER"
            )
        files = [_from_hub(hub_id, path, flag) for path in paths]
        if paths:
            found[split] = [file for file in files if file is not None]
    if "train" not in found:
        raise InputError(
            f"{flag}: the hub repository {hub_id} has no train file ({TYPES}) in its root or in data/: name one with "
            f"--dataset.train {HUB_SCHEME}{hub_id}/PATH, or give a folder with --dataset.source FOLDER"
        )
    return found
