"""RunPlan: everything a run depends on, as plain data; typed, frozen, printable, saved with every checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer, field_validator

from llmft_core.options import Options, comma_separated
from llmft_core.values import Precision, WorkerRange

SINGLE_KINDS = ("dataset", "storage", "strategy", "method")
"""Kinds of which a run has exactly one; `model` is one too but names a model, `tracker` may be repeated."""

Choice = dict[str, Any]
"""A plugin and its options in the plan: `{"name": "s3", "bucket": "b"}`."""


def as_choice(value: Any) -> Any:
    """`storage: s3` is short for `storage: {name: s3}`."""
    return {"name": value} if isinstance(value, str) else value


def as_choices(value: Any) -> Any:
    """`tracker: jsonl` is short for `tracker: [{name: jsonl}]`."""
    values = value if isinstance(value, list) else [value]
    return [as_choice(item) for item in values]


def as_nonfinite(value: Any) -> Any:
    """`stop`, or `skip:N`; `skip N` is the same. Raises ValueError."""
    if isinstance(value, str) and (found := re.fullmatch(r"stop|skip[: ]([1-9]\d{0,8})", value.strip())):
        return f"skip:{found[1]}" if found[1] else "stop"
    raise ValueError("write stop, or skip:N with the number of steps that may be skipped, such as skip:3")


def as_workers(value: Any) -> Any:
    """A number of workers, or a range of them: `4`, `2:4`; `4:4` is 4."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+)(?::(\d+))?", str(value).strip())
    if found is None:
        raise ValueError("use a number of workers, 0 or more, or MIN:MAX")
    fewest, most = int(found[1]), int(found[2] or found[1])
    if found[2] and not 1 <= fewest <= most:
        raise ValueError("in MIN:MAX, MIN is 1 or more and MAX not less than MIN")
    return most if fewest == most else f"{fewest}:{most}"


Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class ModelOptions(Options):
    """Which model is trained."""

    name: str = Field(
        "llama-2-tiny", min_length=1, description="a model's short name, a hub id (owner/name), a folder or a URI"
    )
    tokenizer: str = Field("", description="folder, file, URI or hub id of another tokenizer than the model's own")


class WeightsOptions(Options):
    """Where pretrained weights come from."""

    mirror: str = Field(
        "", description="folder or URI from which models with a short name or hub id are taken instead of the hub"
    )
    share: bool = Field(
        False,
        description="nodes of a cluster split what comes from a mirror or URI, and take the rest from each other: for "
        "a source that is slower than N nodes together",
    )


class DataOptions(Options):
    """What becomes of rows."""

    on_long: Literal["drop", "truncate", "error"] = Field(
        "drop", description="what to do with a row longer than the context; truncation keeps the end token"
    )
    max_dropped: float = Field(
        0.05, ge=0, le=1, description="largest share of rows that may be dropped or cut; more is refused"
    )
    train_on: str = Field(
        "completion",
        min_length=1,
        description="what is trained: completion (what the format marks), all, or roles (ROLE,…)",
    )
    on_bad_row: Literal["error", "quarantine"] = Field(
        "error",
        description="what to do with rows that cannot be used: refuse to start, or set them aside and train the others",
    )
    max_bad_rows: float = Field(
        0.01, ge=0, le=1, description="largest share of a split's rows that may be set aside; more is refused"
    )
    mix: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(comma_separated)] = Field(
        [], description="passes of an epoch over each training source, in their order (2,0.5); default: one each"
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="where rows are encoded: local (all cores of this machine), ray (all nodes of --cluster)"
    )
    processes: NotNegative | None = Field(
        None, description="processes that encode on this machine; 0: none but this one; default: one a core"
    )
    rehash: bool = Field(
        False, description="read the sources and the token cache whole, also where they seem to be as they were"
    )
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the training rows kept for evaluation where there is no test split"
    )
    packing: Literal["none", "best-fit"] = Field(
        "none",
        description="best-fit: rows share a context without seeing each other; a row of the global batch is then a "
        "packed one",
    )
    pad_to_context: bool = Field(
        False, description="pad every row to the context length, not only to the longest beside it"
    )
    drop_last: bool = Field(
        False, description="leave out the incomplete last batch of an epoch; else it weighs as many tokens as it has"
    )


class CheckpointOptions(Options):
    """When checkpoints are written, how, and which are kept. The last step always writes one."""

    every_epochs: NotNegative = Field(1, description="write a checkpoint after so many epochs; 0: never by epochs")
    every_steps: NotNegative = Field(0, description="write a checkpoint after so many optimizer steps; 0: never")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="type of the written weights; auto: that of --precision"
    )
    keep_last: NotNegative = Field(0, description="keep so many of the newest checkpoints; 0: all, unless keep-best")
    keep_best: NotNegative = Field(0, description="keep so many of the best checkpoints too; 0: by keep-last alone")
    best_by: Literal["eval_loss", "train_loss"] = Field(
        "eval_loss", description="what makes a checkpoint good: low loss"
    )


class StateOptions(Options):
    """When the state for exact resume is written: fp32 masters, moments and counters, 12 bytes a trained parameter."""

    every_steps: NotNegative = Field(0, description="write a state after so many optimizer steps; 0: never by steps")
    every_minutes: float = Field(60.0, ge=0, description="write a state after so many minutes; 0: never by time")
    keep_last: Positive = Field(1, description="keep so many of the newest states")


class RunPlan(Options):
    """One run. Fields that are None are decided by what the cluster has, before anything is written."""

    name: str = Field("", description="name of the run and of its folder; default: dataset, model and time")
    dataset: Annotated[Choice, BeforeValidator(as_choice)] = Field(
        {"name": "arithmetic"}, description="what to train on"
    )
    storage: Annotated[Choice, BeforeValidator(as_choice)] = Field(
        {"name": "local"}, description="where runs and checkpoints are written"
    )
    strategy: Annotated[Choice, BeforeValidator(as_choice)] | None = Field(
        None, description="how training is spread; default: ddp on CPU or one GPU, zero-3 on several GPUs"
    )
    model: Annotated[ModelOptions, BeforeValidator(as_choice)] = Field(
        ModelOptions(), description="the model that is fine-tuned"
    )
    weights: WeightsOptions = Field(WeightsOptions(), description="pretrained weights")
    method: Annotated[Choice, BeforeValidator(as_choice)] = Field({"name": "full"}, description="what is trained")
    tracker: Annotated[list[Choice], BeforeValidator(as_choices)] = Field(
        [{"name": "jsonl"}], description="who watches the run; repeatable"
    )
    backends: dict[str, dict[str, Any]] = Field(
        {}, description="options of storage backends for URIs outside of the run's storage, by backend name"
    )

    epochs: Positive | None = Field(
        None, description="passes over the training rows; default 1, or as many as --max-steps needs"
    )
    max_steps: Positive | None = Field(None, description="end after so many optimizer steps, if the epochs do not")
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak learning rate; default: the model family's, times ten for lora"
    )
    warmup_steps: NotNegative = Field(0, description="optimizer steps over which the rate rises linearly to its peak")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="how the rate falls after the warm-up: to zero, or not at all"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices only")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global L2 norm")
    global_batch: Positive = Field(
        32, description="rows (or packed rows) in one optimizer step, for any number of workers"
    )
    micro_batch: Positive | None = Field(
        None, description="rows in one forward pass of one worker; default: the largest that fits evenly, at most 8"
    )
    eval_micro_batch: Positive | None = Field(
        None, description="rows in one forward pass of an evaluation; default: the micro-batch"
    )
    eval_every_steps: NotNegative = Field(0, description="evaluate after so many optimizer steps too; 0: epochs only")
    context_length: Positive = Field(512, description="longest row in tokens")
    precision: Precision | None = Field(
        None, description="arithmetic of training; default: bf16 on GPUs that have it, else fp32"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    compile: bool = Field(
        False,
        description="compile the model's repeated blocks by torch.compile, a minute or more before the first step; "
        "nearly nothing is gained on CPU; not tried on GPUs, refused with zero-3",
    )
    seed: NotNegative = Field(0, description="seed of data order, dropout and new embeddings")
    deterministic: bool = Field(
        False, description="kernels that give the same bits every time: exact resume on GPUs, some steps slower"
    )

    workers: Annotated[int | str | None, BeforeValidator(as_workers)] = Field(
        None,
        description="training processes; MIN:MAX: fewer where a cluster has lost a node, and more when it has one "
        "again; 0: train in this process, without a cluster; default: one a GPU, or 2",
    )
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] | None = Field(
        None, description="GPUs of each worker; 0 trains on CPU; default: 1 where the cluster has GPUs"
    )
    max_failures: NotNegative = Field(
        0, description="start the workers again so many times after one was lost, from the newest state; Ray only"
    )
    on_nonfinite: Annotated[str, BeforeValidator(as_nonfinite)] = Field(
        "stop",
        description="what to do where loss or gradient is not finite, which is never applied: stop, or skip:N, which "
        "goes on without such steps, N of them at most",
    )
    step_timeout: float = Field(
        3000.0,
        ge=0,
        description="seconds without a micro-batch, a round of an evaluation or a whole step after which a rank hangs: "
        "its stack is written aside and the run ends; 0: never",
    )
    cluster: str = Field(
        "auto", description="auto (RAY_ADDRESS if set, else local), local (start Ray on this machine), or an ADDRESS"
    )

    data: DataOptions = Field(DataOptions(), description="what becomes of rows")
    checkpoint: CheckpointOptions = Field(CheckpointOptions(), description="checkpoints")
    state: StateOptions = Field(StateOptions(), description="state for exact resume")
    smoke_test: bool = Field(
        False, description="one optimizer step, one evaluation batch and a full checkpoint: proves the pipeline"
    )
    disable_plugin: Annotated[list[str], BeforeValidator(comma_separated)] = Field(
        [], description="do not load this plugin (entry, distribution or both joined by a colon); repeatable"
    )

    @property
    def nonfinite_steps(self) -> int:
        """Steps that `on_nonfinite` lets the whole run skip."""
        return int(self.on_nonfinite.partition(":")[2] or 0)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("use letters, digits, dot, dash and underscore, a letter or digit first, at most 100")
        return name

    @field_validator("dataset", "storage", "strategy", "method")
    @classmethod
    def _choice_has_a_name(cls, choice: Choice | None) -> Choice | None:
        if choice is not None and not isinstance(choice.get("name"), str):
            raise ValueError("a plugin is chosen by its name: write `name: …`")
        return choice

    @property
    def worker_range(self) -> WorkerRange | None:
        """`workers` as the fewest and the most; None while they are open."""
        if self.workers is None:
            return None
        fewest, _, most = str(self.workers).partition(":")
        return WorkerRange(int(fewest), int(most or fewest))

    @field_serializer("*", when_used="json")
    def _plain(self, value: Any) -> Any:
        return value

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data, in the vocabulary of flags and YAML."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunPlan:
        """The inverse of `to_json`."""
        return cls.model_validate(dict(data))
