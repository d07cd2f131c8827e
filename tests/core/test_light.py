"""Start-up is cheap, and this proves it by what is not imported."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = (
    "torch",
    "transformers",
    "ray",
    "deepspeed",
    "accelerate",
    "pyarrow",
    "peft",
    "datasets",
    "tensorboard",
    "wandb",
    "mlflow",
)

SCRIPT = """
import json, sys
import llmft_core, llmft_core.plan, llmft_core.cli.plugins, llmft_core.cli.doctor, llmft_core.cli.main
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
catalog = Catalog(load_plugins())
catalog.families()
print(json.dumps([sorted(sys.modules), [entry.name for entry in catalog.entries]]))
"""


def test_plugins_are_listed_without_any_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    modules, names = json.loads(done.stdout)
    assert names
    assert [module for module in modules if module in HEAVY] == []


def test_an_extension_module_costs_no_heavy_library_either() -> None:
    """The test kit is for plugin authors: importing a contract must not load torch."""
    script = "import json, sys, llmft_core.testing; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert [module for module in json.loads(done.stdout) if module in HEAVY] == []
