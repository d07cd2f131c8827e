"""Files → token tables in the cache, before any training process exists; the workers only open the folder."""

from __future__ import annotations

import hashlib
import json
import shutil
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
from llmft_core.errors import InputError, LlmftError, Problem, Problems
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

    @property
    def quarantine(self) -> Path:
        """The file with the rows that cannot be used, on the machine that prepared the data; there where any are."""
        return quarantine_file(self.folder.parents[1], self.digest)

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
            new = not folder.exists()
            if new:
                aside = quarantine_file(cache, key)
                Build(dataset, plan, tokenizer, recipe, sources, digests, key, aside).write(folder)
            data = _named(PreparedData.open(folder), sources)
            try:
                refuse(data, plan)
            except InputError:
                if new:  # nobody will train on it
                    shutil.rmtree(folder)
                raise
    except OSError as error:  # the sources' own errors are InputErrors already
        raise _unwritable(folder.parent, error) from error
    if plan.data.rehash and not new:
        data.verify()
    return data


def _unwritable(folder: Path, error: OSError) -> LlmftError:
    return LlmftError(
        f"cannot write the token cache {folder}: {error.strerror or error}; set LLMFT_CACHE to a folder that is yours "
        "and has room"
    )


def _named(data: PreparedData, sources: Mapping[Split, SplitSource]) -> PreparedData:
    """With the names that the sources have now: the same bytes may have been read from elsewhere the first time."""
    names: dict[str, str] = {}
    splits: dict[Split, SplitReport] = {}
    for split, one in data.report.splits.items():
        source = sources.get(split, sources["train"])
        files = [file.name for file in source.files]
        names |= zip(one.files, files, strict=True)
        weights = source.weights if split in sources else one.weights
        splits[split] = one.renamed(source.name, files, weights)
    data.train.sources = splits["train"].files
    if data.test is not None:
        data.test.sources = splits["test"].files
    return replace(data, report=replace(data.report, splits=splits).renamed(names))


def refuse(data: PreparedData, plan: RunPlan) -> None:
    """Raises Problems where rows cannot be used and the plan does not put up with that, and where more rows are dropped
    or cut than it allows."""
    splits = data.report.splits
    of_sources: dict[Split, list[SplitReport]] = {split: [one] for split, one in splits.items()}
    if plan.data.validation_fraction > 0:  # rows held out of the training rows are no source of their own
        of_sources = {"train": list(splits.values())}
    read: dict[Split, tuple[int, int]] = {}
    problems: list[Problem] = []
    for split, parts in of_sources.items():
        rows, bad, dropped, cut = (
            sum(getattr(part, name) for part in parts) for name in ("rows_read", "bad", "dropped", "cut")
        )
        read[split] = (rows, bad)
        try:
            refuse_loss(split, rows, dropped, cut, max(part.longest_read for part in parts), plan)
        except InputError as error:
            problems.append(Problem("", str(error)))
    try:
        data.report.bad_rows.refuse(read, plan.data, data.quarantine)
    except Problems as error:
        raise Problems([*error.problems, *problems], error.heading) from None
    if problems:
        raise Problems(problems)


def quarantine_file(cache: Path, key: str) -> Path:
    """Where the rows lie that cannot be used, of the data with this key."""
    return cache / "quarantine" / f"{key[:16]}.jsonl"


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
