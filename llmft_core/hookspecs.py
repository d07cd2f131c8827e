"""One hook a kind. None is `firstresult`: choosing by name is the catalogue's job, and would hide conflicts here."""

from __future__ import annotations

import pluggy

from llmft_core.extensions import DatasetFormat, Method, ModelFamily, StorageBackend, Strategy, Tracker

hookspec = pluggy.HookspecMarker("llmft")
hookimpl = pluggy.HookimplMarker("llmft")
"""Marks a plugin's functions: `@hookimpl def llmft_dataset_formats(): return [MyFormat]`."""


@hookspec
def llmft_dataset_formats() -> list[type[DatasetFormat]]:  # type: ignore[empty-body]
    """Dataset formats, chosen with `--dataset NAME`. Used by `gsm8k`."""


@hookspec
def llmft_storage_backends() -> list[type[StorageBackend]]:  # type: ignore[empty-body]
    """Storage backends, chosen with `--storage NAME` or by the scheme of a URI. Used by `s3`."""


@hookspec
def llmft_strategies() -> list[type[Strategy]]:  # type: ignore[empty-body]
    """Ways to spread training over ranks, chosen with `--strategy NAME`. Used by `zero-3`."""


@hookspec
def llmft_model_families() -> list[type[ModelFamily]]:  # type: ignore[empty-body]
    """Model families, chosen by the names they offer or by the config.json they claim. Used by `llama2`."""


@hookspec
def llmft_methods() -> list[type[Method]]:  # type: ignore[empty-body]
    """What is trained, chosen with `--method NAME`. Used by `full`."""


@hookspec
def llmft_trackers() -> list[type[Tracker]]:  # type: ignore[empty-body]
    """Watchers of a run, chosen with `--tracker NAME` (repeatable). Used by `tensorboard`."""


KINDS: dict[str, str] = {
    "dataset": "llmft_dataset_formats",
    "storage": "llmft_storage_backends",
    "strategy": "llmft_strategies",
    "model": "llmft_model_families",
    "method": "llmft_methods",
    "tracker": "llmft_trackers",
}
"""Kind (the flag that chooses it) → hook."""
