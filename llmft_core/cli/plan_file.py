"""A plan that lies in storage: `--plan s3://bucket/run.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, LlmftError
from llmft_core.plan_layers import Layer
from llmft_core.plan_sources import parse_plan

LARGEST = 2**20  # bytes


def read_plan_at(uri: str, catalog: Catalog, backends: Mapping[str, dict[str, Any]]) -> Layer:
    """The plan at a URI, as a layer; `backends` holds options by backend name. Raises InputError, whatever goes wrong:
    nothing has been started."""
    from llmft_core.storage.places import Places
    from llmft_core.storage.transfer import read_bytes

    try:
        content = read_bytes(Places(catalog, None, backends).place(uri), LARGEST + 1)
    except LlmftError as error:
        raise InputError(f"--plan: {error}") from error
    if len(content) > LARGEST:
        raise InputError(f"--plan: {uri} is larger than {LARGEST // 2**20} MiB: give a YAML file")
    return parse_plan(content, uri)
