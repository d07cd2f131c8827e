"""benchmarks/gpu.py runs; what it measures on the CPU means nothing, and its formula is that of the paper."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    specification = importlib.util.spec_from_file_location("gpu_benchmark", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_flops_are_those_of_the_papers_formula(gpu: ModuleType) -> None:
    config = gpu.config_of(tiny=False)
    every = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096  # 6.6 billion: all but the input embedding
    lengths = np.full(3, 2048)
    assert gpu.flops_per_token(config, lengths, "full") == 6 * every + 12 * 32 * 4096 * 2048
    assert gpu.flops_per_token(config, lengths, "lora") == 4 * every + 12 * 32 * 4096 * 2048
    # A token of the longer sample attends to more: (100² + 300²) / 400 tokens on the average.
    uneven = gpu.flops_per_token(config, np.array([100, 300]), "full")
    assert uneven == 6 * every + 12 * 32 * 4096 * 250


def test_both_methods_run_on_the_cpu() -> None:
    command = [sys.executable, str(PROGRAM), "--tiny", "--contexts", "64", "--tokens", "128", "--steps", "4"]
    command += ["--candidates", "llmft"]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'plugins'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines[2:]] == [
        ["full, 64 packed", "llmft", "2 × 2, recomputing"],
        ["lora, 64 packed", "llmft", "2 × 2, recomputing"],
    ]
    for line in lines[2:]:
        assert int(line[3].replace(",", "")) > 0
        assert float(line[5].removesuffix(" GiB")) > 0
