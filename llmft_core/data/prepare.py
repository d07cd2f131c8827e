"""Files → token tables in the cache, before any training process exists; the workers only open the folder."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.data.build import Build, content_digest, refuse_loss
from llmft_core.data.digests import Digests
from llmft_core.data.encode import ENCODER_VERSION, EncoderRecipe
from llmft_core.data.report import DataReport, SplitReport
from llmft_core.data.sources import SplitSource, find_sources, joined_digest
from llmft_core.data.tables import TokenTable
from llmft_core.errors import InputError, LlmftError
from llmft_core.extensions import DatasetFormat, SourceOptions, Split
from llmft_core.plan import RunPlan

if TYPE_CHECKING:
    from llmft_core.storage.places import Places

__all__ = ["DataReport", "PreparedData", "SplitReport", "TokenTable", "prepare"]


@dataclass(frozen=True)
class PreparedData:
    """The token tables of a run, and what became of the rows. `digest` names the folder: equal digests, equal rows."""

    folder: Path
    report: DataReport
    train: TokenTable
    test: TokenTable | None

    @property
    def digest(self) -> str:
        """The key of the cache, 64 hexadecimal digits."""
        return self.report.digest

    @classmethod
    def open(cls, folder: Path) -> PreparedData:
        """From the folder alone, as workers do. Raises LlmftError where it is not whole."""
        try:
            report = DataReport.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8")))
            tables = {split: TokenTable(folder / split, one.files) for split, one in report.splits.items()}
            for split, table in tables.items():
                if len(table) != report.splits[split].rows:
                    raise ValueError(f"{split} has {len(table)} rows, not {report.splits[split].rows}")
            return cls(folder, report, tables["train"], tables.get("test"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, f"{type(error).__name__}: {error}") from error

    def verify(self) -> None:
        """Reads all tokens and labels. Raises LlmftError where they are not those that were written."""
        tables = {"train": self.train, "test": self.test}
        found = {split: table.digest() for split in self.report.splits if (table := tables[split]) is not None}
        if content_digest(found) != self.report.content_digest:
            raise _damaged(self.folder, "its tokens are not those that were written")


def _damaged(folder: Path, why: str) -> LlmftError:
    return LlmftError(
        f"the token cache {folder} is damaged ({why}): remove that folder and start again, and it is made anew"
    )


def prepare(
    dataset: DatasetFormat, plan: RunPlan, tokenizer: Any, fingerprint: str, places: Places | None, cache: Path
) -> PreparedData:
    """Read, check and encode all rows of all splits into `cache/data/<key>/{train,test}`; a second call with the same
    bytes, tokenizer and options only hashes the sources.

    `tokenizer` has the format's special tokens; `fingerprint` stands for what it does to text. Raises Problems with
    all rows that cannot be used, InputError for missing or empty sources and for too many rows dropped or cut,
    LlmftError where the cache cannot be written.
    """
    from filelock import FileLock

    sources = find_sources(dataset, places, plan.data.mix)
    fraction = plan.data.validation_fraction
    if "test" in sources and fraction > 0:
        raise InputError(
            f"--data.validation-fraction {fraction:g}: there are test rows already ({sources['test'].name}); leave it "
            "out, or give the training rows alone with --dataset.train FILE"
        )
    recipe = EncoderRecipe.of(
        tokenizer, plan.data.train_on, plan.context_length, plan.data.on_long, tags=dataset.special_tokens
    )
    try:
        memory = Digests(cache / "digests")
        digests = {
            split: [memory.of(file, again=plan.data.rehash) for file in source.files]
            for split, source in sources.items()
        }
    except OSError as error:
        raise _unwritable(cache, error) from error
    key = cache_key(dataset, plan, recipe, fingerprint, digests)
    folder = cache / "data" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{key}.lock")):
            if not folder.exists():
                Build(dataset, plan, recipe, sources, digests, key).write(folder)
    except OSError as error:  # the sources' own errors are InputErrors already
        raise _unwritable(folder.parent, error) from error
    data = _renamed(PreparedData.open(folder), sources)
    if plan.data.rehash:
        data.verify()
    splits = data.report.splits
    for split in sources:
        # Rows held out of the training rows are no source of their own.
        parts = list(splits.values()) if fraction > 0 else [splits[split]]
        read, dropped, cut = (sum(getattr(part, name) for part in parts) for name in ("rows_read", "dropped", "cut"))
        refuse_loss(split, read, dropped, cut, max(part.longest_read for part in parts), plan)
    return data


def _unwritable(folder: Path, error: OSError) -> LlmftError:
    return LlmftError(
        f"cannot write the token cache {folder}: {error.strerror or error}; set LLMFT_CACHE to a folder that is yours "
        "and has room"
    )


def cache_key(
    dataset: DatasetFormat,
    plan: RunPlan,
    recipe: EncoderRecipe,
    fingerprint: str,
    digests: Mapping[Split, Sequence[str]],
) -> str:
    """SHA-256 of all that the tables depend on: what is read, by which code, with which tokenizer and options. Not
    where it is read from."""
    options = dataset.options.model_dump(mode="json", by_alias=True)
    if isinstance(dataset.options, SourceOptions):
        options = {name: value for name, value in options.items() if name not in ("source", "train", "test")}
    fraction = plan.data.validation_fraction
    parts = {
        "encoder": ENCODER_VERSION,
        "sources": {split: joined_digest(each) for split, each in digests.items()},
        "format": [dataset.name, options, _code_digest(type(dataset))],
        "tokenizer": [fingerprint, hashlib.sha256(recipe.tokenizer.encode()).hexdigest(), recipe.start, recipe.end_id],
        "tags": recipe.tags,
        "train-on": plan.data.train_on,
        "context-length": plan.context_length,
        "on-long": plan.data.on_long,
        "validation": [fraction, plan.seed] if fraction else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code_digest(format_type: type[DatasetFormat]) -> str:
    """SHA-256 of the modules a format is written in, so that who edits `parse` does not get yesterday's rows."""
    hasher = hashlib.sha256()
    for module_name in sorted({cls.__module__ for cls in format_type.__mro__} - {"builtins", "abc"}):
        file = getattr(sys.modules.get(module_name), "__file__", None)
        if file and not module_name.startswith("llmft_core."):
            hasher.update(Path(file).read_bytes())
    return hasher.hexdigest()


def _renamed(data: PreparedData, sources: Mapping[Split, SplitSource]) -> PreparedData:
    """The same with today's names of the files: the same bytes may have been read from elsewhere the first time."""
    splits: dict[Split, SplitReport] = {}
    for split, one in data.report.splits.items():
        source = sources.get(split, sources["train"])
        files = tuple(file.name for file in source.files)
        names = dict(zip(one.files, files, strict=True))

        def moved(origins: tuple[str, ...], names: Mapping[str, str] = names) -> tuple[str, ...]:
            parts = (origin.rpartition(":") for origin in origins)
            return tuple(f"{names[name]}:{line}" for name, _, line in parts)

        splits[split] = replace(
            one,
            source=source.name,
            files=files,
            dropped_origins=moved(one.dropped_origins),
            cut_origins=moved(one.cut_origins),
        )
    data.train.sources = splits["train"].files
    if data.test is not None:
        data.test.sources = splits["test"].files
    return replace(data, report=replace(data.report, splits=splits))
