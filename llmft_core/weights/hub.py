"""A repository of the Hugging Face hub → a folder in its cache. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are the hub
library's own, and so is the cache: models that other programs fetched are there already."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmft_core.errors import InputError
from llmft_core.weights.files import INDEX, NOT_THE_MODEL, SMALL_FILES, TOKENIZER_FILES, check_weights

ELSEWHERE = ["*/*", *(f"{prefix}*" for prefix in NOT_THE_MODEL)]
PICKLES = ["*.bin", "*.pt", "*.pth"]


def is_hub_id(name: str) -> bool:
    """`owner/name`."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name))


def cache() -> Path:
    """The hub's own cache on this node. It need not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def fetch_model(repository: str, *, weights: bool) -> Path:
    """Config and tokenizer, and on demand the weights. Returns the snapshot's folder, named after its commit.

    Without `weights` it is still checked that there are some to fetch. Raises InputError: unknown or gated
    repository, no network, no safetensors.
    """
    patterns = [*SMALL_FILES, INDEX]
    if weights:
        return _fetch(repository, [*patterns, "*.safetensors"])
    with _quiet():
        folder = _fetch(repository, patterns)
        listed = _listed(repository, folder.name)
    if listed is not None:
        check_weights(listed, repository)
    return folder


def fetch_tokenizer(repository: str) -> Path:
    """The tokenizer's files alone. Raises InputError as `fetch_model`."""
    with _quiet():
        return _fetch(repository, list(TOKENIZER_FILES))


def _fetch(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=ELSEWHERE))
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        raise InputError(explain(repository, error)) from error
    except Exception as error:
        # The hub library changes its HTTP client between versions; what it raises in the middle of a download is
        # known by where it comes from. Anything else is a fault of ours and keeps its traceback.
        if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore", "requests", "hf_xet")):
            raise InputError(explain(repository, error)) from error
        raise


def _listed(repository: str, commit: str) -> list[str] | None:
    """Weight files of a commit in the repository, nothing fetched; None where the hub cannot be asked just now."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        found = snapshot_download(
            repository,
            revision=commit,
            allow_patterns=["*.safetensors", *PICKLES],
            ignore_patterns=ELSEWHERE,
            dry_run=True,
        )
    except (DryRunError, OSError):
        return None  # offline with a cached model: whether its weights are cached too shows when they are staged
    return [info.filename for info in found]


def explain(repository: str, error: BaseException) -> str:
    """The hub's error as one line: what is wrong and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import get_token

    hub = constants.ENDPOINT
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    signed_in = get_token() is not None
    if isinstance(error, GatedRepoError):
        ask = f"ask for access at {hub}/{repository}"
        then = "with the account of your HF_TOKEN" if signed_in else "and set HF_TOKEN to a token of that account"
        return f"model {repository}: gated, and you have no access; {ask} {then}"
    if isinstance(error, RepositoryNotFoundError):
        private = "HF_TOKEN has no access to it" if signed_in else "it is private: set HF_TOKEN"
        return f"model {repository}: not found at {hub}; check the spelling, or {private}"
    if isinstance(error, HFValidationError):
        return f"model {repository}: not a hub id (owner/name); a folder starts with ./ or /"
    if status in (401, 403):
        return f"model {repository}: {hub} refuses the token (HTTP {status}); set HF_TOKEN to a valid one"
    if constants.HF_HUB_OFFLINE:
        return (
            f"model {repository}: not (or not wholly) in the hub cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is "
            "set; unset it, or give a folder: --model FOLDER"
        )
    if isinstance(error, OSError) and error.errno is not None and response is None:
        return f"model {repository}: {os.strerror(error.errno)}, in {constants.HF_HUB_CACHE}; set HF_HOME elsewhere"
    cause = f"HTTP {status}" if status else _root_cause(error, isinstance(error, LocalEntryNotFoundError))
    return (
        f"model {repository}: {hub} cannot be reached ({cause}), and the hub cache does not have it; check the network "
        "and HF_ENDPOINT, or give a folder or URI that has the model: --model FOLDER"
    )


def _root_cause(error: BaseException, unwrap: bool) -> str:
    cause = error.__cause__ if unwrap and error.__cause__ is not None else error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars for a few small files."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
