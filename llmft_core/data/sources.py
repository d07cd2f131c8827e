"""Where the rows of a split come from: a folder, a file, a URI, the hub or a generator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from llmft_core.data.hub import fetch_from_hub
from llmft_core.data.rows import Row, digest_of, jsonl_rows, parquet_rows, row_digest
from llmft_core.errors import InputError, LlmftError
from llmft_core.extensions import DatasetFormat, SourceOptions, Split
from llmft_core.values import Origin

if TYPE_CHECKING:
    from llmft_core.storage.places import Place, Places

SPLITS: tuple[Split, ...] = ("train", "test")
SUFFIXES = (".jsonl", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class FileSource:
    """A file with the rows of a split. `location` is where it is read from: a local path, or a URI; `name` is what
    users see in `file:line`; `flag` is the flag that led here."""

    name: str
    location: str
    flag: str
    places: Places | None

    def open(self) -> IO[bytes]:
        """The file's bytes. Raises InputError where it cannot be opened."""
        if is_uri(self.location):
            from llmft_core.storage.transfer import open_read

            return open_read(_place(self.places, self.location))
        try:
            return Path(self.location).open("rb")
        except OSError as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: Exception) -> InputError:
        """A failure of the file system in the words of the flag."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return InputError(f"{self.flag}: cannot read {self.name}: {reason}")

    def digest(self) -> str:
        """SHA-256 of the bytes, in hexadecimal. Raises InputError where they cannot be read."""
        with self.open() as file:
            try:
                return digest_of(file)
            except OSError as error:
                raise self.unreadable(error) from error

    def rows(self, digest: str) -> Iterator[tuple[Origin, Row]]:
        """Every row with its line number from 1; what is no row is a RowProblem. Raises InputError where the file
        cannot be read, or where a .jsonl file no longer has this digest when its end is reached."""
        with self.open() as file:
            read = parquet_rows(file) if self.location.endswith(".parquet") else jsonl_rows(file, digest)
            try:
                for line, row in read:
                    yield Origin(self.name, line), row
            except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
                raise self.unreadable(error) from error


@dataclass(frozen=True)
class GeneratedSource:
    """Rows that a format makes up."""

    format: DatasetFormat
    split: Split
    flag: str = "--dataset"

    @property
    def name(self) -> str:
        """`arithmetic:train`."""
        return f"{self.format.name}:{self.split}"

    def _generate(self) -> Iterator[dict[str, object]]:
        rows = self.format.generate(self.split)
        if rows is None:
            raise LlmftError(f"dataset {self.format.name} generated {self.split} rows once and now does not")
        return rows

    def digest(self) -> str:
        """SHA-256 of the rows as JSON."""
        return row_digest(self._generate())

    def rows(self, digest: str) -> Iterator[tuple[Origin, Row]]:
        """The rows, numbered from 1. `digest` is not checked: they follow from the options alone."""
        for number, row in enumerate(self._generate(), start=1):
            yield Origin(self.name, number), row


Source = FileSource | GeneratedSource


def find_sources(dataset: DatasetFormat, places: Places | None) -> dict[Split, Source]:
    """The sources of the splits; `test` only where there is one.

    Raises InputError, in one line that names the flag and what was looked for: no such folder or file, no training
    rows in it, a file type that is not read, the hub out of reach.
    """
    generated: dict[Split, Source] = {
        split: GeneratedSource(dataset, split) for split in SPLITS if dataset.generate(split) is not None
    }
    if "train" in generated:
        return generated
    options = dataset.options if isinstance(dataset.options, SourceOptions) else SourceOptions()
    if options.train or options.test:
        return _single_files(options, places)
    if not options.source and not dataset.hub_id:
        raise InputError(f"dataset {dataset.name} has no rows of its own: give them with --dataset.source FOLDER")
    if options.source and is_uri(options.source):
        return _in_folder(options.source, places)
    if options.source and Path(options.source).expanduser().exists():
        return _in_folder(options.source, places)
    hub_id = options.source or dataset.hub_id
    if not HUB_ID.fullmatch(hub_id):
        raise InputError(
            f"--dataset.source: there is no folder {options.source}, and it is no URI and no hub id (owner/name)"
        )
    return _on_hub(hub_id, dataset)


def is_uri(location: str) -> bool:
    """Whether it is written `scheme://…`."""
    return "://" in location


def _place(places: Places | None, uri: str) -> Place:
    if places is None:
        raise LlmftError(f"{uri} is read through a storage backend, and none is at hand here")
    return places.place(uri)


def _exists(location: str, places: Places | None) -> bool:
    if not is_uri(location):
        return Path(location).is_file()
    from llmft_core.storage.transfer import exists

    return exists(_place(places, location))


def _single_files(options: SourceOptions, places: Places | None) -> dict[Split, Source]:
    if options.source:
        raise InputError(
            "--dataset.source and --dataset.train or --dataset.test: give the folder or the files, not both"
        )
    if not options.train:
        raise InputError("--dataset.test is given without training rows: add --dataset.train FILE")
    found: dict[Split, Source] = {}
    for split, name in zip(SPLITS, (options.train, options.test), strict=True):
        if not name:
            continue
        flag, location = f"--dataset.{split}", name if is_uri(name) else str(Path(name).expanduser())
        if not location.endswith(SUFFIXES):
            raise InputError(f"{flag}: {name} is read neither as rows nor as a table: use a .jsonl or .parquet file")
        if not _exists(location, places):
            raise InputError(f"{flag}: there is no file {name}")
        found[split] = FileSource(name, location, flag, places)
    return found


def _in_folder(folder: str, places: Places | None) -> dict[Split, Source]:
    flag = "--dataset.source"
    location = folder.rstrip("/") if is_uri(folder) else str(Path(folder).expanduser())
    if not is_uri(folder) and not Path(location).is_dir():
        raise InputError(f"{flag}: {folder} is a file: give the folder it lies in, or the file with --dataset.train")
    found: dict[Split, Source] = {}
    for split in SPLITS:
        names = [f"{split}{suffix}" for suffix in SUFFIXES if _exists(f"{location}/{split}{suffix}", places)]
        if len(names) > 1:
            raise InputError(f"{flag}: {folder} has {' and '.join(names)}: choose one with --dataset.{split} FILE")
        for name in names:
            found[split] = FileSource(f"{folder.rstrip('/')}/{name}", f"{location}/{name}", flag, places)
    if "train" not in found:
        raise InputError(f"{flag}: {folder} has no train.jsonl and no train.parquet; name a file with --dataset.train")
    return found


def _on_hub(hub_id: str, dataset: DatasetFormat) -> dict[Split, Source]:
    """The format's own repository has the files it says; another one has those, or what a folder would have."""
    found: dict[Split, Source] = {}
    for split in SPLITS:
        declared = [dataset.hub_files[split]] if split in dataset.hub_files else []
        own = hub_id == dataset.hub_id and bool(dataset.hub_files)
        candidates = declared if own else declared + [f"{split}{suffix}" for suffix in SUFFIXES]
        for candidate in candidates:
            path = fetch_from_hub(hub_id, candidate)
            if path:
                name = f"hf://datasets/{hub_id}/{candidate}"
                found[split] = FileSource(name, str(path), "--dataset.source", None)
                break
        else:
            if split == "train" or (own and declared):
                raise InputError(
                    f"--dataset.source: the hub repository {hub_id} has no {' and no '.join(candidates)}; "
                    "give a folder with --dataset.source FOLDER"
                )
    return found
