"""Where this node keeps what it has fetched or made."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`LLMFT_CACHE`, or `~/.cache/llmft`. It need not exist yet."""
    return Path(os.environ.get("LLMFT_CACHE") or "~/.cache/llmft").expanduser().absolute()
