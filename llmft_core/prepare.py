"""From a plan to a job: everything that happens before a worker starts, shared by `llmft run` and `llmft plan`."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from llmft_core.catalog import Catalog
from llmft_core.data.chat import chat_template, roles_of, stop_tokens, trained_roles
from llmft_core.data.chat_template import ChatTemplate
from llmft_core.data.formats import open_dataset
from llmft_core.data.order import Order, mix_of
from llmft_core.data.prepare import PreparedData, prepare
from llmft_core.data.sources import SplitSource
from llmft_core.data.steps import FirstEpoch, epoch_steps, first_epoch, total_steps
from llmft_core.errors import InputError, Problem, Problems
from llmft_core.extensions import DatasetFormat, Method
from llmft_core.placing import LARGEST_DEFAULT_MICRO_BATCH, place
from llmft_core.plan import RunPlan
from llmft_core.preflight import (
    compiler_problems,
    context_problems,
    disk_problems,
    machine_problems,
    sharing_problems,
    storage_problems,
    tracker_problems,
)
from llmft_core.sizes import checkpoint_bytes, hidden_size, staged_bytes
from llmft_core.storage.places import Places
from llmft_core.train.cluster import Cluster, survey
from llmft_core.train.job import Job
from llmft_core.train.method import Share, has_dropout, setting_of, trial
from llmft_core.values import Conversation, ModelSize, Placement, RowProblem, Setting
from llmft_core.weights.cache import cache_folder
from llmft_core.weights.stage import ModelFolder, stage_model
from llmft_core.weights.tokenizer import fingerprint, load_tokenizer, save_tokenizer, tokenizer_folder

T = TypeVar("T")


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
    share: Share
    job: Job
    first_epoch: FirstEpoch

    @property
    def padding(self) -> float:
        """Share of computed positions that are padding."""
        return self.first_epoch.padding

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the weights of one checkpoint."""
        return checkpoint_bytes(self.plan, self.size, self.share)

    @property
    def staged_bytes(self) -> int:
        """Bytes that one node's cache must have room for beside weights and data."""
        return staged_bytes(self.plan, self.size, self.share, self.cluster, self.placement)


def make_ready(
    plan: RunPlan,
    catalog: Catalog,
    *,
    debug: bool,
    say: Callable[[str], None],
    before: Mapping[str, Any] | None = None,
) -> Ready:
    """Check everything and prepare the data. Raises Problems: all that is wrong, together. `before`: the plan so far of
    a run that is there already, and goes on.

    Writes to this machine's cache, and a probe object to the run's storage that is deleted again; nothing else.
    """
    problems: list[Problem] = []
    cluster = survey(plan, debug=debug)
    usual = LARGEST_DEFAULT_MICRO_BATCH if before is None else before["micro-batch"]
    placed = _attempt(lambda: place(plan, cluster, catalog, usual), "workers", problems)
    asked = plan.micro_batch
    plan = placed[0] if placed else plan
    places = Places(catalog, plan.storage, plan.backends)
    problems += storage_problems(plan, places, new=before is None)
    problems += sharing_problems(plan, cluster, catalog)
    problems += tracker_problems(plan, catalog)
    if cluster.address in ("", "local"):  # elsewhere the nodes are asked, and this machine may be none
        problems += machine_problems(plan, catalog) if placed else []
        problems += compiler_problems("cuda" if cluster.gpus else "cpu") if plan.compile else []
    if plan.data.engine == "ray" and cluster.address in ("", "local"):
        why = "ray encodes on the nodes of a cluster elsewhere, and this run has this machine: local uses all its cores"
        problems.append(Problem("data.engine", why))

    shares: list[Share] = []

    def model_problems(model: ModelFolder, tokenizer: Any, special_ids: tuple[int, ...]) -> list[Problem]:
        found = context_problems(plan, model.config)
        if placed is None:
            return found
        setting = setting_of(plan, placed[1], special_ids, catalog)
        size = model.family.size(model.config)
        vocabulary = 0 if tokenizer is None else len(tokenizer)
        method: Method = catalog.create("method", plan.method)
        found += method.problems(setting)
        share = _attempt(lambda: share_of(method, model, size, vocabulary, setting), "", found)
        if share is not None:
            shares.append(share)
            if cluster.address in ("", "local"):  # as above
                found += disk_problems(staged_bytes(plan, size, share, cluster, placed[1]))
        return found

    material = _attempt(lambda: prepare_data(plan, catalog, places, say=say, check=model_problems), "", problems)
    if material is None or placed is None or problems:
        raise Problems(problems)
    model, tokenizer, data = material.model, material.tokenizer, material.data
    size = model.family.size(model.config)
    placement = replace(placed[1], hidden_size=hidden_size(model.config))
    order = Order.of(data.train, plan, mix_of(data))
    steps = _attempt(lambda: epoch_steps(order, plan, placement, asked), "global-batch", problems)
    if steps is None:
        raise Problems(problems)
    key = hashlib.sha256(f"{material.fingerprint} {model.digest} {tokenizer.chat_template}".encode()).hexdigest()
    folder = cache_folder() / "tokenizers" / key
    if not folder.is_dir():  # the key says what is in it; another run may be copying from it
        own_files = tokenizer_folder(model, plan.model.tokenizer, places, plan.weights.mirror)
        save_tokenizer(tokenizer, folder, own_files)
    job = Job(
        plan=plan,
        placement=placement,
        total_steps=total_steps(plan, steps),
        epoch_steps=steps,
        vocabulary=len(tokenizer),
        pad_id=int(tokenizer.pad_token_id or 0),
        stop_ids=tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in material.stop_tokens),
        provenance=provenance(catalog, plan, data, model.digest, material.fingerprint),
        model=model.path,
        data=data.folder,
        tokenizer=folder,
        special_ids=material.special_ids,
        dropout=has_dropout(catalog.create("method", plan.method), model.config),
    )
    first = first_epoch(order, plan, placement)
    return Ready(plan, placement, cluster, catalog, places, data, model, size, shares[0], job, first)


def share_of(method: Method, model: ModelFolder, size: ModelSize, vocabulary: int, setting: Setting) -> Share:
    """How much of the model the method trains. Raises InputError where its options do not fit the model."""
    return trial(method, model.path, vocabulary, setting) if method.freezes else Share(size.parameters, adapter=False)


@dataclass(frozen=True)
class Material:
    """What a run is made of: the rows as tokens, and the model and tokenizer that they are for."""

    dataset: DatasetFormat
    model: ModelFolder
    """Without its weights."""
    tokenizer: Any
    """A fast one of transformers, with the format's special tokens and the chat template of its rows."""
    fingerprint: str
    """What the tokenizer does, as SHA-256 (hex)."""
    stop_tokens: tuple[str, ...]
    """What ends an answer."""
    data: PreparedData
    special_ids: tuple[int, ...]
    """As `Setting.special_ids`."""


def prepare_data(
    plan: RunPlan,
    catalog: Catalog,
    places: Places,
    *,
    say: Callable[[str], None],
    check: Callable[[ModelFolder, Any, tuple[int, ...]], list[Problem]] = lambda model, tokenizer, special_ids: [],
) -> Material:
    """The rows of a plan as token tables, from this machine's cache where they are in it. Needs no cluster, no weights
    and no storage of the run. `check`: what else is wrong with the model, its tokenizer (or None) and the ids of its
    special tokens, to be reported together with the rows.

    Raises Problems: model, tokenizer, `check`, sources and rows together.
    """
    problems: list[Problem] = []
    opened = _attempt(lambda: open_dataset(catalog, plan, places), "dataset", problems)
    special_tokens = opened[0].special_tokens if opened else ()
    model = _attempt(lambda: stage_model(plan, catalog, places, weights=False), "model", problems)
    tokenizer: Any = None
    if model is not None:
        tokenizer = _attempt(
            lambda: load_tokenizer(model, plan.model.tokenizer, special_tokens, places, plan.weights.mirror),
            "model.tokenizer",
            problems,
        )
        special_ids = special_ids_of(tokenizer, special_tokens, model.config) if tokenizer is not None else ()
        problems += check(model, tokenizer, special_ids)
    if opened is None or model is None or tokenizer is None:
        raise Problems(problems)
    dataset, sources = opened
    say(f"preparing dataset {dataset.name}")
    print_ = fingerprint(tokenizer)
    template = model.family.chat_template(tokenizer)
    data = _attempt(
        lambda: prepare(dataset, sources, plan, tokenizer, print_, cache_folder(), template), "dataset", problems
    )
    if data is None or problems:
        raise Problems(problems)
    tokenizer.chat_template, stop_tokens = prompting(dataset, sources["train"], data, tokenizer, template, plan)
    return Material(dataset, model, tokenizer, print_, stop_tokens, data, special_ids)


def special_ids_of(tokenizer: Any, special_tokens: Sequence[str], config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of a dataset's special tokens, but for those that every text has (bos, eos), and of all that the model of
    `config` has no row for yet."""
    usual = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    named = {int(tokenizer.convert_tokens_to_ids(token)) for token in special_tokens} - usual
    rows = config.get("text_config", config).get("vocab_size", len(tokenizer))
    return tuple(sorted({*named, *range(rows, len(tokenizer))}))


def prompting(
    dataset: DatasetFormat, source: SplitSource, data: PreparedData, tokenizer: Any, template: str, plan: RunPlan
) -> tuple[str | None, tuple[str, ...]]:
    """How a checkpoint is prompted as its rows were written: its chat template and the tokens that end an answer. For
    chats that is `template`, the model's own; where rows have neither tags nor template, what the tokenizer has. The
    first training row that can be used shows which."""
    digest = data.report.splits["train"].source_digest
    rows = (row if isinstance(row, RowProblem) else dataset.parse(row) for _, row in source.rows(digest))
    for row in rows:
        if isinstance(row, RowProblem):
            continue  # set aside
        if not row.template:
            roles = trained_roles(dataset.roles or roles_of(row), plan.data.train_on)
            begins = tokenizer.bos_token_id in tokenizer("")["input_ids"]
            return chat_template(roles, begins) or tokenizer.chat_template, stop_tokens(roles)
        written = ChatTemplate.of(tokenizer, template).literal(row, plan.data.train_on)
        if isinstance(written, Conversation) and any(message.trained for message in written.messages):
            ends = [message.closing for message in written.messages if message.trained and message.closing]
            return template, tuple(dict.fromkeys(ends))
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
    for name in (
        "llmft",
        "torch",
        "transformers",
        "tokenizers",
        "accelerate",
        "deepspeed",
        "peft",
        "ray",
        "safetensors",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def keys_of(job: Job) -> dict[str, str]:
    """The places of the prepared data and the tokenizer below a node's cache."""
    cache = cache_folder()
    return {name: str(Path(getattr(job, name)).relative_to(cache)) for name in ("data", "tokenizer")}
