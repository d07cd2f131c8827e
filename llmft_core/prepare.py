"""From a plan to a job: everything that happens before a worker starts, shared by `llmft run` and `llmft plan`."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from llmft_core.catalog import Catalog
from llmft_core.data.batches import padding_waste, steps_per_epoch
from llmft_core.data.chat import chat_template
from llmft_core.data.prepare import PreparedData, prepare
from llmft_core.data.sources import find_sources
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.extensions import DatasetFormat
from llmft_core.placing import place
from llmft_core.plan import RunPlan
from llmft_core.preflight import context_problems, disk_problems, sharing_problems, storage_problems
from llmft_core.storage.places import Places
from llmft_core.train.cluster import Cluster, survey
from llmft_core.train.job import Job
from llmft_core.values import Conversation, ModelSize, Placement, RowProblem
from llmft_core.weights.cache import cache_folder
from llmft_core.weights.stage import ModelFolder, stage_model
from llmft_core.weights.tokenizer import fingerprint, load_tokenizer, save_tokenizer, tokenizer_folder

T = TypeVar("T")

BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Ready:
    """A run about which everything is known and nothing has been started."""

    plan: RunPlan
    placement: Placement
    cluster: Cluster
    catalog: Catalog
    places: Places
    data: PreparedData
    model: ModelFolder
    size: ModelSize
    job: Job
    padding: float
    """Share of computed positions that are padding."""

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the weights of one checkpoint."""
        return self.size.parameters * BYTES_OF[written_type(self.plan)]


def make_ready(
    plan: RunPlan, catalog: Catalog, *, debug: bool, say: Callable[[str], None], resumed: bool = False
) -> Ready:
    """Check everything and prepare the data. Raises Problems: all that is wrong, together. `resumed`: the run is there
    already, and goes on.

    Writes to this machine's cache, and a probe object to the run's storage that is deleted again; nothing else.
    """
    problems: list[Problem] = []
    cluster = survey(plan, debug=debug)
    placed = _attempt(lambda: place(plan, cluster, catalog), "workers", problems)
    plan = placed[0] if placed else plan
    places = Places(catalog, plan.storage, plan.backends)
    problems += storage_problems(plan, places, new=not resumed)
    problems += sharing_problems(plan, cluster, catalog)
    dataset: DatasetFormat = catalog.create("dataset", plan.dataset)
    model = _attempt(lambda: stage_model(plan, catalog, places, weights=False), "model", problems)
    tokenizer: Any = None
    if model is not None:
        tokenizer = _attempt(
            lambda: load_tokenizer(model, plan.model.tokenizer, dataset.special_tokens, places),
            "model.tokenizer",
            problems,
        )
    if model is None or tokenizer is None:
        _attempt(lambda: find_sources(dataset, places), "dataset", problems)  # all that can be said without a tokenizer
        raise Problems(problems)
    size = model.family.size(model.config)
    problems += context_problems(plan, model.config)
    if cluster.address in ("", "local"):  # elsewhere the nodes are asked, and this machine may be none
        problems += disk_problems(size.parameters * BYTES_OF[written_type(plan)])
    say(f"preparing dataset {dataset.name}")
    print_ = fingerprint(tokenizer)
    data = _attempt(lambda: prepare(dataset, plan, tokenizer, print_, places, cache_folder()), "dataset", problems)
    if data is None or placed is None or problems:
        raise Problems(problems)
    template, stop = chat_template(first_conversation(dataset, data, places))
    if template:
        tokenizer.chat_template = template
    key = hashlib.sha256(f"{print_} {model.digest} {tokenizer.chat_template}".encode()).hexdigest()
    folder = cache_folder() / "tokenizers" / key
    if not folder.is_dir():  # the key says what is in it; another run may be copying from it
        save_tokenizer(tokenizer, folder, tokenizer_folder(model, plan.model.tokenizer, places))
    placement = placed[1]
    per_epoch = steps_per_epoch(len(data.train), placement.global_batch)
    job = Job(
        plan=plan,
        placement=placement,
        total_steps=total_steps(plan, per_epoch),
        steps_per_epoch=per_epoch,
        vocabulary=len(tokenizer),
        pad_id=int(tokenizer.pad_token_id or 0),
        stop_ids=tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in stop),
        provenance=provenance(catalog, plan, data, model.digest, print_),
        model=model.path,
        data=data.folder,
        tokenizer=folder,
    )
    waste = padding_waste(data.train, plan.seed, placement.global_batch, placement.micro_batch)
    return Ready(plan, placement, cluster, catalog, places, data, model, size, job, waste)


def written_type(plan: RunPlan) -> str:
    """The type in which weights are written; fp32 while the precision is open."""
    return plan.checkpoint.dtype if plan.checkpoint.dtype != "auto" else plan.precision or "fp32"


def first_conversation(dataset: DatasetFormat, data: PreparedData, places: Places) -> Conversation:
    """The first training row as a conversation: its form is that of all. The rows have been checked already."""
    source = find_sources(dataset, places)["train"]
    for _, row in source.rows(data.report.splits["train"].source_digest):
        parsed = row if isinstance(row, RowProblem) else dataset.parse(row)
        if isinstance(parsed, Conversation):
            return parsed
    raise InputError(f"{source.name} has no rows any more: it was changed while it was read")


def _attempt(action: Callable[[], T], path: str, problems: list[Problem]) -> T | None:
    """The action's result; an input error becomes a problem, so that the next checks still run."""
    try:
        return action()
    except Problems as error:
        problems += [Problem("", error.heading), *error.problems] if error.heading else list(error.problems)
    except InputError as error:
        problems.append(Problem(path, str(error)))
    return None


def total_steps(plan: RunPlan, per_epoch: int) -> int:
    """Optimizer steps of the run: what --epochs or --max-steps allows, whichever ends first."""
    if plan.smoke_test:
        return 1
    limits = [plan.epochs * per_epoch if plan.epochs else math.inf, plan.max_steps or math.inf]
    return int(min(limits))


def provenance(catalog: Catalog, plan: RunPlan, data: PreparedData, model: str, tokenizer: str) -> dict[str, Any]:
    """Where a checkpoint came from: the whole plan, digests and versions. No secrets: the plan holds none."""
    return {
        "plan": plan.to_json(),
        "data": {
            "content": data.report.content_digest,
            "sources": {name: split.source_digest for name, split in data.report.splits.items()},
        },
        "model": model,
        "tokenizer": tokenizer,
        "python": platform.python_version(),
        "versions": library_versions(),
        "plugins": {record.id: record.version for record in catalog.plugins.records if record.state == "loaded"},
    }


def library_versions() -> Mapping[str, str]:
    """Versions of what decides the numbers."""
    found = {}
    for name in ("llmft", "torch", "transformers", "tokenizers", "accelerate", "deepspeed", "ray", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def shipped(job: Job) -> dict[str, dict[str, bytes]]:
    """The prepared data and tokenizer as bytes, for nodes that do not have them in their cache."""
    return {
        name: {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for name, folder in (("data", job.data), ("tokenizer", job.tokenizer))
    }


def keys_of(job: Job) -> dict[str, str]:
    """The shipped folders' places below a node's cache."""
    cache = cache_folder()
    return {name: str(Path(getattr(job, name)).relative_to(cache)) for name in ("data", "tokenizer")}
