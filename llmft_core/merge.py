"""An adapter and its base model become one model: for an answer, or as a whole checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmft_core.catalog import Catalog
from llmft_core.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_FILE
from llmft_core.checkpoint.export import WeightWriter, write_rest
from llmft_core.checkpoint.publish import publish
from llmft_core.checkpoint.shards import divide
from llmft_core.checkpoint.snapshot import Layout, persistent_buffers, written_dtype
from llmft_core.checkpoint.staging import Staging
from llmft_core.checkpoint.stored import pull, read_manifest
from llmft_core.errors import InputError
from llmft_core.extensions import Method
from llmft_core.plan import RunPlan
from llmft_core.storage.places import Place, Places
from llmft_core.storage.transfer import list_files
from llmft_core.weights.cache import cache_folder
from llmft_core.weights.files import is_tokenizer_file
from llmft_core.weights.stage import ModelFolder, stage_model


@dataclass(frozen=True)
class Adapted:
    """An adapter as its manifest describes it."""

    place: Place
    manifest: Mapping[str, Any]

    @property
    def plan(self) -> RunPlan:
        """That of the run which trained it. Raises InputError where the manifest has none."""
        try:
            return RunPlan.from_json(self.manifest["provenance"]["plan"])
        except KeyError:
            raise InputError(
                f"{self.place.uri} does not say how it was trained (its manifest has no plan, it was pushed from plain "
                "files): merge it with peft: PeftModel.from_pretrained(base, FOLDER).merge_and_unload()"
            ) from None


def adapted(place: Place) -> Adapted | None:
    """The complete checkpoint at `place`, or None where it holds a whole model. Raises as `read_manifest` does."""
    manifest = read_manifest(place)
    return Adapted(place, manifest) if ADAPTER_CONFIG in manifest["files"] else None


def base_of(adapter: Adapted, plan: RunPlan, named: str, catalog: Catalog, places: Places) -> ModelFolder:
    """The model that the adapter was trained on, with its weights on this node: as the adapter's plan names it, or as
    the user does (`named`). `plan`: what is said here of where weights come from.

    Raises InputError where it is not there, or is another model.
    """
    trained = adapter.plan
    name = named or trained.model.name
    mirror = plan.weights.mirror or trained.weights.mirror
    weights = plan.weights.model_copy(update={"mirror": mirror})
    model = plan.model.model_copy(update={"name": name})
    try:
        base = stage_model(plan.model_copy(update={"model": model, "weights": weights}), catalog, places, weights=True)
    except InputError as error:
        raise InputError(f"the base of {adapter.place.uri}: {error}; --base names it where it is now") from error
    wanted = adapter.manifest["provenance"]["model"]
    if base.digest != wanted and not named:
        raise InputError(
            f"{name} is not the model that {adapter.place.uri} was trained on ({wanted[:12]}…, now "
            f"{base.digest[:12]}…): give that one with --base; a name given there is taken as it is"
        )
    return base


def merged_model(folder: Path, adapter: Adapted, base: Path, catalog: Catalog, dtype: torch.dtype) -> Any:
    """The base with the adapter of a local folder in its weights, on CPU. Raises LlmftError where they do not fit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    method: Method = catalog.create("method", adapter.plan.method)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True, local_files_only=True)
    entries = len(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    if entries > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(entries, mean_resizing=False)  # the adapter has the values of the new rows
    merged: Any = method.merge(model, folder)
    merged.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return merged.eval()


def merge(adapter: Adapted, base: ModelFolder, target: Place, catalog: Catalog) -> int:
    """Write base and adapter as one whole, verified checkpoint, in the type that the run's precision says; returns its
    bytes. Raises InputError where something is at the target, LlmftError where the two do not fit."""
    if there := sorted(list_files(target)):
        raise InputError(f"{target.uri} is not empty ({', '.join(there[:3])}): give another --out")
    dtype = written_dtype(adapter.plan)
    scratch = Path(tempfile.mkdtemp(prefix="llmft-merge-"))
    try:
        pull(adapter.place, folder := scratch / "adapter")
        model = merged_model(folder, adapter, base.path, catalog, dtype)
        (tokenizer := scratch / "tokenizer").mkdir()
        for path in folder.iterdir():
            if is_tokenizer_file(path.name):
                shutil.copyfile(path, tokenizer / path.name)
        staging = Staging.open(cache_folder(), adapter.plan.name, f"{adapter.place.name}-merged")
        with staging.writing("the merged model"):
            layout = whole_layout(model, dtype)
            writer = WeightWriter(layout, base.path, staging.folder)
            write_weights(model, layout, writer)
            write_rest(layout, tokenizer, (), staging.folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    exported = writer.exported()
    facts = {
        **{name: adapter.manifest[name] for name in ("step", "epoch", "metrics") if name in adapter.manifest},
        "provenance": {**adapter.manifest["provenance"], "merged": origin(adapter)},
    }
    return publish(staging.settle(), target, exported, facts, shapes=layout.shapes, trained=exported.changed)


def origin(adapter: Adapted) -> dict[str, str]:
    """What a merged checkpoint says of its adapter."""
    digest = adapter.manifest["files"][ADAPTER_FILE]["sha256"]
    return {"adapter": adapter.place.uri, "sha256": digest}


def whole_layout(model: Any, dtype: torch.dtype) -> Layout:
    """A checkpoint's layout, written by this process alone."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    buffers = persistent_buffers(model)
    return Layout(
        shards=divide(shapes, dtype.itemsize, world_size=1),
        shapes={**shapes, **{name: tuple(buffer.shape) for name, buffer in buffers.items()}},
        buffers=frozenset(buffers),
        dtype=dtype,
        trained=frozenset(shapes),
        config=model.config,
        generation_config=model.generation_config,
    )


def write_weights(model: Any, layout: Layout, writer: WeightWriter) -> None:
    """File by file: of one file there is a copy at a time."""
    parameters = dict(model.named_parameters())
    for shard in layout.shards:
        tensors = {name: parameters[name].detach().to(layout.dtype).contiguous() for name in shard.names}
        if shard is layout.shards[0]:
            tensors |= {name: buffer.detach().clone() for name, buffer in persistent_buffers(model).items()}
        writer.write(shard.file, tensors)
