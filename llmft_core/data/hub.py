"""Files of a dataset repository on the Hugging Face hub, through the hub's own cache."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from llmft_core.errors import InputError

T = TypeVar("T")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_SCHEME = "hf://datasets/"
"""How the hub's own tools write a file of a dataset repository: `hf://datasets/OWNER/NAME/PATH`."""
PROBE_SECONDS = 5.0
"""How long the hub may take to accept a connection; its client would retry for half a minute."""


def fetch_from_hub(hub_id: str, filename: str) -> Path | None:
    """The local path of a file of `datasets/hub_id`, downloaded where the cache has none; None where the repository
    has no such file. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HOME are the hub client's own.

    Raises InputError: out of reach and not cached, no such repository, no permission.
    """
    from huggingface_hub import errors, hf_hub_download

    offline = not _online()

    def fetch() -> Path | None:
        try:
            return Path(hf_hub_download(hub_id, filename, repo_type="dataset", local_files_only=offline))
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            return None

    return _explained(fetch, hub_id, f"{hub_id}/{filename}")


def hub_names(hub_id: str) -> tuple[list[str], bool]:
    """Paths of all files of `datasets/hub_id`, sorted, and whether these are all: out of the hub's reach they are what
    its cache has. Raises InputError as `fetch_from_hub`."""
    from huggingface_hub import HfApi, snapshot_download

    if _online():
        names = _explained(lambda: HfApi().list_repo_files(hub_id, repo_type="dataset"), hub_id, hub_id)
        return sorted(names), True

    def cached() -> list[str]:
        folder = Path(snapshot_download(hub_id, repo_type="dataset", local_files_only=True))
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    return _explained(cached, hub_id, hub_id), False


def _online() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _reachable(constants.ENDPOINT)


def _explained(ask: Callable[[], T], hub_id: str, what: str) -> T:
    """The client's answer; its errors in one line."""
    from huggingface_hub import constants, errors

    way_out = "; give your own copy with --dataset.source FOLDER"
    try:
        return ask()
    except errors.GatedRepoError as error:
        raise InputError(
            f"--dataset.source: the hub wants its terms accepted before {hub_id} is read: accept them on its page and "
            f"set HF_TOKEN{way_out}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"--dataset.source: there is no folder {hub_id} here and no dataset {hub_id} on {constants.ENDPOINT} that "
            f"this HF_TOKEN may read{way_out}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} is out of reach"
        raise InputError(f"--dataset.source: {what} is not in the hub's cache and {why}{way_out}") from error
    except (OSError, errors.HTTPError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(f"--dataset.source: cannot fetch {what}: {first_line}{way_out}") from error


def _reachable(endpoint: str) -> bool:
    """Whether the hub accepts connections. Behind a proxy that is the proxy's affair, and taken for granted."""
    parts = urlsplit(endpoint)
    if parts.scheme in getproxies() or "all" in getproxies() or parts.hostname is None:
        return True
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True
