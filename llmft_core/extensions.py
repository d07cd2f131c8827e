"""The six kinds of extension. A contract holds what its kind alone can know; the rest belongs to the core.

An extension is a class with a `name`, a one-line `summary` and an `options_type`; it is constructed with its validated
options on the driver, and again on every worker from the same plan, so it holds no state that cannot be rebuilt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llmft_core.errors import Problem
from llmft_core.options import Options, comma_separated
from llmft_core.values import (
    Adapter,
    Conversation,
    Device,
    ModelSize,
    Placement,
    Role,
    RowProblem,
    Setting,
    StepOutcome,
)

if TYPE_CHECKING:
    import torch

Split = Literal["train", "test"]

API_VERSION = 1
"""Version of the contracts in this file. A plugin module says which one it was written for: `llmft_api = 1`."""


class Extension:
    """What all kinds share."""

    name: ClassVar[str]
    """The name it is chosen by: `--storage NAME`."""
    summary: ClassVar[str]
    """One line for `llmft plugins`."""
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Any) -> None:
        self.options = options

    def node_problems(self, device: Device) -> list[Problem]:
        """What this machine lacks (a folder, a package) for ranks that compute on such a device. The dataset format,
        storage, strategy and method of a run are asked on every node that may get a rank, before anything is staged."""
        return []


# --- datasets -----------------------------------------------------------------------------------------------------


class SourceOptions(Options):
    """Options of a dataset that is read from files: its format inherits them."""

    source: str = Field(
        "", description="folder or URI with train.jsonl and test.jsonl, or a hub id; default: the format's own hub id"
    )
    train: Annotated[list[str], BeforeValidator(comma_separated)] = Field(
        [], description="files, folders, globs or URIs with the training rows (A,B), instead of a source; repeatable"
    )
    test: Annotated[list[str], BeforeValidator(comma_separated)] = Field(
        [],
        description="files, folders, globs or URIs with the test rows (A,B), instead of a source; repeatable",
    )


class DatasetFormat(Extension, ABC):
    """How rows become conversations. The core owns sources, line numbers, error reports, tokens and caches."""

    special_tokens: tuple[str, ...] = ()
    """Tokens this format writes as `opening` or `closing`; each becomes one id of the tokenizer, in this order."""
    roles: tuple[Role, ...] = ()
    """The roles its rows may have, where it knows them all beforehand: `--data.train-on` is checked against them
    before a row is read, and the chat template of a checkpoint knows them all. Empty: the first row shows its roles."""
    companions: ClassVar[Mapping[str, str]] = {}
    """Small files that say how rows are read: name beside the rows → the option that names a file elsewhere
    (`{"tokens.json": "tokens"}`)."""
    companion_digests: Mapping[str, str] = {}
    """SHA-256 of each companion as it was read. Set by the core."""
    keys: ClassVar[tuple[str, ...]] = ()
    """All keys that a row may have: another one is an error. Empty: `parse` says which ones it cannot use."""
    hub_files: Mapping[Split, str] = {}
    """Files of the splits in a hub repository (`main/train-00000-of-00001.parquet`, or a glob), where there is one."""
    hub_id: ClassVar[str] = ""
    """The hub repository that is read when no source is given."""

    @abstractmethod
    def parse(self, row: Mapping[str, Any]) -> Conversation | RowProblem:
        """A conversation, or what is wrong with the row. Messages that should be trained by default say so."""

    def may_hold_rows(self, file_name: str) -> bool:
        """Whether a file of a folder may be one of its own, by the name: for a dataset of which several versions lie in
        one folder. Files that the user names are not asked about."""
        return True

    def read_companion(self, name: str, content: bytes) -> None:
        """Take in one of its `companions`: called once for each, before any row is parsed and before `special_tokens`
        and `roles` are looked at, both of which it may set on the instance. The instance is pickled as it then is.
        Raises InputError with what is wrong in it, without the file's name, which the core puts before it."""
        raise TypeError(f"dataset format {self.name} names {name} as a companion, but does not read it")

    def generate(self, split: Split) -> Iterator[dict[str, Any]] | None:
        """Rows that are made up rather than read (deterministically from the options), or None: read the source."""
        return None


# --- storage ------------------------------------------------------------------------------------------------------


class StorageBackend(Extension, ABC):
    """A place for runs: an fsspec filesystem and a root in it. The core derives transfers, publishing and probes."""

    scheme: ClassVar[str]
    """The URI scheme it answers to: `s3` for `s3://bucket/key`."""

    @abstractmethod
    def filesystem(self) -> Any:
        """An `fsspec.AbstractFileSystem` that pickles and has explicit time-outs. No secret is taken from options."""

    @abstractmethod
    def root(self) -> str:
        """Path in the filesystem under which runs lie (`bucket/prefix`). InputError where an option is missing."""

    def shared_by_nodes(self) -> bool:
        """Whether every node of a cluster sees the same files: true for object stores."""
        return True

    def ranged_reads(self) -> RangedReads | None:
        """A faster way to read than the filesystem's `cat_file`, made once a process; None: there is none."""
        return None

    def verified_uploads(self) -> VerifiedUploads | None:
        """Uploads of which the store verifies every part, made once a process. None: the core uses the filesystem's
        `put_file` and then reads everything back."""
        return None

    creates_exclusively: ClassVar[bool] = False
    """Whether `filesystem().pipe_file(path, data, mode="create")` raises FileExistsError where a file is there, even
    when two processes write at once. Not every server behind one protocol keeps this."""

    flags: str = "storage"
    """Where its options are in the plan: `backends.NAME` unless it is the run's storage. Set by the core."""

    def explain(self, error: BaseException, path: str) -> str:
        """A store's own error as one line that names the thing, the cause and the next action. It may speak of
        `--storage.…`: where the options stand elsewhere in this plan, the core says so instead."""
        return f"{path}: {type(error).__name__}: {error}"

    def uri(self, path: str) -> str:
        """A path of the filesystem as users write it."""
        return f"{self.scheme}://{path}"


class RangedReads(ABC):
    """Reads of a store straight into memory, from many threads at once. A store's own errors are raised as they are,
    with FileNotFoundError for what is not there; the core repeats, explains and ends them."""

    @abstractmethod
    def describe(self, path: str) -> tuple[int, str]:
        """Bytes of a file as it is now, and its version: another one (ETag, generation) after every change."""

    def describe_many(self, paths: Sequence[str]) -> dict[str, tuple[int, str]]:
        """What `describe` tells of these files, as far as one request can (a listing); the others are asked for one by
        one. {} where the store lists no such version, or the user may not list."""
        return {}

    @abstractmethod
    def read_into(self, path: str, version: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` on, from exactly this version: ChangedMeanwhile where it is another one.
        Fewer bytes are a ConnectionError."""


class VerifiedUploads(ABC):
    """Uploads in which no other bytes than ours get to a path: a checksum of ours travels with the data, and the store
    refuses what does not match it (a ConnectionError, so that they are sent again); of a part, which nobody sees before
    `complete`, the store's own checksum may be compared instead. Called from many threads."""

    least_part: ClassVar[int] = 5 * 2**20
    """Bytes of every part but the last, at least."""
    most_parts: ClassVar[int] = 10_000

    @abstractmethod
    def put(self, path: str, data: memoryview) -> None:
        """A whole file in one request, over one that is there."""

    @abstractmethod
    def begin(self, path: str) -> str:
        """The id of a new upload in parts. Nothing is at `path` before `complete`."""

    @abstractmethod
    def unfinished(self, path: str) -> str | None:
        """The newest upload to this path that was begun, by this process or another, and not completed."""

    @abstractmethod
    def parts(self, path: str, upload: str) -> dict[int, tuple[int, str]]:
        """Parts that the store holds: number (from 1) → (bytes, tag)."""

    @abstractmethod
    def tag(self, data: memoryview) -> str:
        """The tag by which this store lists a part with this content: one of another content has another tag. Where
        it cannot be known (the store encrypts), a tag that no part has: an upload is then begun anew."""

    @abstractmethod
    def put_part(self, path: str, upload: str, number: int, data: memoryview) -> str:
        """Send one part, and return its tag once the store is known to hold just these bytes."""

    @abstractmethod
    def complete(self, path: str, upload: str, tags: Sequence[str]) -> bool:
        """Make the file of the parts 1, 2, …: it appears whole. FileNotFoundError where the upload is gone. Returns
        whether the answer shows that it is made of just these parts; where not, the core asks for its size."""

    @abstractmethod
    def abandon(self, path: str, upload: str) -> None:
        """Delete what was sent."""


# --- strategies ---------------------------------------------------------------------------------------------------


class Strategy(Extension, ABC):
    """How training is spread over ranks: pure data on the driver, an `Engine` on each worker."""

    partitions_weights: ClassVar[bool] = False
    """Whether a rank of its engine holds only a part of each weight."""

    def problems(self, placement: Placement) -> list[Problem]:
        """What this strategy cannot do with such a placement, found before anything is started."""
        return []

    def state_problem(self) -> str:
        """Why states cannot be taken of what it trains (some of it lies where its engine cannot read it), or nothing:
        a plan that writes states is refused then."""
        return ""

    def configuration(self, placement: Placement) -> dict[str, Any]:
        """What it will do, as plain data for the plan (the DeepSpeed configuration), or {}."""
        return {}

    @abstractmethod
    def engine(self, placement: Placement, rank: int) -> Engine:
        """The worker's half. The default process group exists already."""


ReadElements = Callable[[int, "torch.Tensor"], None]
"""`read(start, into)` fills `into` (1-d, any type and device) with the elements [start, start + len(into)) of one
parameter's values, flattened in row-major order, converted to the type of `into`."""

FillPartition = Callable[["torch.nn.Parameter", ReadElements], None]
"""`fill(parameter, read)` writes this rank's part of a parameter, and of its values reads only these."""


Fragment = tuple[str, str, int, "torch.Tensor"]
"""(parameter's name, kind, start, values): the elements [start, start + len(values)) of what the optimizer keeps of one
parameter, flattened in row-major order. Kinds are `master` (the fp32 weights), `exp_avg` and `exp_avg_sq` (AdamW's
moments). `values` is 1-d float32, on any device, and goes on changing with training."""

ReadFragment = Callable[[str, str, int, "torch.Tensor"], None]
"""`read(name, kind, start, into)` fills `into` (1-d float32, any device) with the elements from `start` on."""


class Engine(ABC):
    """One rank's hold on the model under one strategy. The loop and the export know only this."""

    @property
    @abstractmethod
    def parameter_dtype(self) -> torch.dtype:
        """Type in which the model's parameters are loaded; masters and autocast are the engine's own affair."""

    @abstractmethod
    def building(self) -> AbstractContextManager[None]:
        """The context in which the model is built (ZeRO-3 partitions parameters as they are made)."""

    def filler(self) -> FillPartition | None:
        """None: a model made under `building` is whole on every rank, and transformers loads it. An engine under which
        transformers makes parameters partitioned from the start returns what fills them between `building` and
        `prepare`: each rank then reads its own part from its node's files. Filling is not collective; together the
        ranks read every element at least once, and padding is no element."""
        return None

    @abstractmethod
    def whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
        """Before `prepare`: a context in which these parameters are whole and may be written. All ranks write the
        same; where parameters are partitioned, what rank 0 wrote is kept."""

    @abstractmethod
    def prepare(
        self,
        model: torch.nn.Module,
        make_optimizer: Callable[[Sequence[tuple[str, torch.nn.Parameter, int]]], torch.optim.Optimizer],
    ) -> None:
        """Take the model over. `make_optimizer` gets (name, parameter, true number of dimensions) of all that is
        trained; a partitioned parameter does not know its own dimensions. Raises LlmftError if what was set up is
        not what the strategy promised."""

    @property
    @abstractmethod
    def model(self) -> torch.nn.Module:
        """What the loop calls for a forward pass."""

    @property
    @abstractmethod
    def bare_model(self) -> torch.nn.Module:
        """The model without the strategy's wrapper: its names, config and buffers."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """`loss` is this micro-batch's share (0-d) of the step's loss: the gradient of the step is that of the SUM of
        all shares over micro-batches and ranks. `last` closes the step. Clipping belongs to the engine."""

    @abstractmethod
    def set_learning_rate(self, learning_rate: float) -> None:
        """For the coming step; called before its last backward."""

    @abstractmethod
    def step(self) -> StepOutcome:
        """Apply the step after its last backward, on all ranks or on none, and clear the gradients.

        It is not applied on any rank where the gradient is not finite, be it on one rank only (in fp16, where the loss
        scaler says so): masters, moments, weights and AdamW's count of steps stay what they were, bit for bit. A loss
        that is not finite has no finite gradient: the core sees to that before `backward`."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter by name, in the model's own order, on every rank alike; tied ones once."""

    @abstractmethod
    def gathered(self, names: Sequence[str], dtype: torch.dtype, rank: int = 0) -> dict[str, torch.Tensor]:
        """Full copies of these parameters in host memory, on this one rank ({} on the others). Collective: all ranks
        call it with the same arguments. Cast to `dtype` from the most precise copy there is."""

    @abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds of the optimizer's state, after a step: together the ranks yield every element of every
        trained parameter exactly once. Before the first step that was applied there are masters alone. Not collective:
        nothing is gathered."""

    @abstractmethod
    def counters(self) -> dict[str, float]:
        """What else the next step depends on, equal on all ranks: `optimizer_steps` (those that were applied), and in
        fp16 what the loss scaler remembers."""

    @abstractmethod
    def restore(self, read: ReadFragment, counters: Mapping[str, float]) -> None:
        """After `prepare`, before the first step: take masters, moments and counters from a state, whatever strategy
        and world size wrote it, reading no more than this rank holds. The weights that the model computes with follow
        the masters. All ranks call it."""

    def holdings(self) -> dict[str, list[torch.Tensor | None]]:
        """What this rank keeps between forward passes, wherever it lies: `weights`, `gradients`, `optimizer` (masters
        and moments); {} before `prepare`. It explains an out-of-memory error: it allocates nothing, and is not
        collective."""
        return {}

    @abstractmethod
    def finish(self) -> None:
        """Let go of everything; called once, also after an error where that is possible."""


# --- models -------------------------------------------------------------------------------------------------------


class ModelFamily(Extension, ABC):
    """A family of model architectures. The core downloads and loads; the family knows names and peculiarities."""

    names: ClassVar[tuple[str, ...]] = ()
    """Short names it offers for `--model`."""
    fallback: ClassVar[bool] = False
    """True for the family that is asked only when no other claims a model."""
    content_version: ClassVar[str] = "1"
    """Version of what `build` writes: raised with any change of its bytes, so that caches make it anew."""

    @abstractmethod
    def hub_id(self, name: str) -> str | None:
        """The hub repository of a short name; None where the model is made by `build`."""

    @abstractmethod
    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with this config.json belongs to the family."""

    @abstractmethod
    def size(self, config: Mapping[str, Any]) -> ModelSize:
        """Parameter counts from config.json alone."""

    def build(self, name: str, folder: Path) -> None:
        """Write the model of a short name without a hub id into `folder` (config, weights, tokenizer): the same
        bytes on every machine."""
        raise TypeError(f"model family {self.name} offers {name} but neither a hub id nor a way to build it")

    def learning_rate(self, name: str) -> float:
        """Peak learning rate that is used when the plan gives none."""
        return 2e-5

    def load_tokenizer(self, folder: Path) -> Any:
        """A fast `transformers` tokenizer from a model folder, its peculiarities mended."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)

    def chat_template(self, tokenizer: Any) -> str:
        """The Jinja template of this model's chats, for rows that bring no tokens of their own; by default the
        tokenizer's own. Empty where there is none."""
        template = getattr(tokenizer, "chat_template", None)
        return str((template.get("default") if isinstance(template, Mapping) else template) or "")


# --- methods ------------------------------------------------------------------------------------------------------


class Method(Extension, ABC):
    """What is trained, and what a checkpoint of it holds."""

    freezes: ClassVar[bool] = False
    """Whether the model's own weights stay as they are. Then `apply` is tried on the driver too, on a model of the meta
    device: what it trains is counted, and what it raises is said before anything is started."""
    learning_rate_factor: ClassVar[float] = 1.0
    """Times the model family's learning rate where the plan gives none."""

    def problems(self, setting: Setting) -> list[Problem]:
        """What cannot be done in this setting, whatever the model is; found before anything is started."""
        return []

    def loading(self, setting: Setting) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained` for weights that will be frozen (`dtype`,
        `quantization_config`). Asked where no weights are partitioned. {}: as the engine trains them."""
        return {}

    @abstractmethod
    def apply(self, model: torch.nn.Module, setting: Setting) -> torch.nn.Module:
        """Choose what is trained (`requires_grad`) and return the model to train, whose forward takes the same
        arguments. Parameters that are made here have the same values on every rank, from `setting.seed` alone; the
        input and output embeddings are whole meanwhile, other weights may be partitioned. Raises InputError where
        the options do not fit the model; its message begins with the option (`method.…:`)."""

    def adapter(self, model: torch.nn.Module, setting: Setting) -> Adapter | None:
        """Of the model that `apply` returned: what checkpoints hold. None: the whole model, in the layout of Hugging
        Face. An adapter needs `merge`."""
        return None

    def merge(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        """The base model, with rows for all tokens, made what an adapter in `folder` (adapter_config.json,
        adapter_model.safetensors) makes of it: a plain transformers model with the names of the base. Raises LlmftError
        where the two do not fit."""
        raise TypeError(f"method {self.name} writes adapters, but does not merge them")


# --- trackers -----------------------------------------------------------------------------------------------------


class Tracker(Extension, ABC):
    """Watches a run from the driver. It observes: an error in a tracker is reported and never changes the run."""

    def problems(self) -> list[Problem]:
        """What would keep it from watching (a package, a login), found on the driver before anything is started."""
        return []

    @abstractmethod
    def start(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """`folder` is local, the tracker's to write to, and is copied to the run's storage now and then and at the
        end."""

    def resume(self, folder: Path, plan: Mapping[str, Any], step: int) -> None:
        """Instead of `start`, where a run goes on after optimizer step `step`: what it logged so far lies in `folder`
        again, and what was logged after that step is taken back, since it will be logged anew."""
        self.start(folder, plan)

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers after an optimizer step or an evaluation, by name (`train/loss`, `eval/perplexity`)."""

    @abstractmethod
    def finish(self) -> None:
        """Flush and close."""

    def break_off(self, *, by_user: bool) -> None:
        """Instead of `finish`, where the run ended before its last step: by its user or a SIGTERM, or by an error."""
        self.finish()
