"""What ranks import, done once for all tests: each rank is a fork of a process that has imported this."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

import accelerate  # noqa: F401
import deepspeed  # noqa: F401
import torch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import llmft_core.train.worker  # noqa: F401

# A fork has none of the threads of its parent. jemalloc, which pyarrow brings, starts its own again.
tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
if others := {Path(task, "comm").read_text().strip() for task in tasks} - {"jemalloc_bg_thd"}:
    raise RuntimeError(f"an import has started threads: {', '.join(sorted(others))}")
