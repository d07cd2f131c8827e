"""Environments put together from installed wheels.

A test makes one through PYTHONPATH, which comes before site-packages: what is imported is the built wheel, even where
the developer has llmft installed in editable mode.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Installed:
    """A Python that sees llmft's wheel and some packages."""

    folders: tuple[Path, ...]
    home: Path

    def python(self, *arguments: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python, away from the repository. `timeout` in seconds."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.home,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, self.folders)), "NO_COLOR": "1", **variables},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def llmft(self, *arguments: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the console script that the wheel installed."""
        return self.python(str(self.folders[0] / "bin" / "llmft"), *arguments, timeout=timeout, **variables)


@dataclass(frozen=True)
class Wheels:
    """Where each wheel lies and is installed, by name: `llmft`, `hello` and the folders in packages/."""

    files: dict[str, Path]
    folders: dict[str, Path]
    home: Path

    def with_packages(self, *names: str) -> Installed:
        """llmft and these."""
        return Installed((self.folders["llmft"], *(self.folders[name] for name in names)), self.home)
