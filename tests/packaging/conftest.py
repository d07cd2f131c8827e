"""Wheels of llmft, of the example and of small odd packages, installed side by side, each in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from wheels import REPOSITORY, Wheels

PACKAGES = Path(__file__).resolve().parent / "packages"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Builds and installs all once: the same two commands that a user's `pip install` comes down to."""
    base = tmp_path_factory.mktemp("wheels")
    sources = {"llmft": REPOSITORY, "hello": REPOSITORY / "examples" / "llmft-plugin-hello"}
    sources |= {path.parent.name: path.parent for path in sorted(PACKAGES.glob("*/pyproject.toml"))}
    files, folders = {}, {}
    for name, source in sources.items():
        built, folder = base / name / "dist", base / name / "installed"
        _run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(source))
        (files[name],) = built.glob("*.whl")
        options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", str(folder))
        _run("-m", "pip", "install", *options, str(files[name]))
        folders[name] = folder
    return Wheels(files, folders, tmp_path_factory.mktemp("elsewhere"))


def _run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
