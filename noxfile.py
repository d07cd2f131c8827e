"""The project's chores. `nox -l` lists them; each session installs all it needs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = True

CONSTRAINTS = ["-c", "constraints.txt"]


def install(session: nox.Session, *extras: str) -> None:
    """The project with the tested versions of everything below it."""
    target = f".[{','.join(extras)}]" if extras else "."
    # torch first and alone: where a CPU build of exactly this version is at hand, pip takes it before anything that
    # depends on torch could ask for the newest one with its gigabytes of CUDA.
    session.install(*CONSTRAINTS, "torch")
    session.install(*CONSTRAINTS, "-e", target)


def environment(session: nox.Session) -> dict[str, str]:
    """Nothing of the caller's plan leaks into a session, and nothing calls home."""
    return {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}


@nox.session
def quickstart(session: nox.Session) -> None:
    """Fine-tune the built-in tiny model on the built-in data, then ask it something."""
    install(session)
    name = f"quickstart-{time.strftime('%Y%m%d-%H%M%S')}"
    session.run("llmft", "run", "--name", name, *session.posargs, env=environment(session))
    if not session.posargs:  # they may have put the run elsewhere
        question = "Tom has 3 apples and buys 4 more. How many apples does he have now?"
        session.run("llmft", "generate", f"llmft-runs/runs/{name}/checkpoint_00000", question, "--max-new-tokens", "40")
    session.log(f"the command of this session is {Path(session.bin) / 'llmft'}")


@nox.session
def tests(session: nox.Session) -> None:
    """What CI runs."""
    install(session, "tests")
    session.run("pytest", "-m", "not slow and not gpu", *session.posargs, env=environment(session))


@nox.session(name="tests-full")
def tests_full(session: nox.Session) -> None:
    """Everything that needs no GPU, the long tests too."""
    install(session, "tests")
    session.run("pytest", "-m", "not gpu", *session.posargs, env=environment(session))


@nox.session
def gpu(session: nox.Session) -> None:
    """Tests that need a CUDA device."""
    install(session, "tests")
    session.run("pytest", "-m", "gpu", *session.posargs, env=environment(session))


@nox.session
def example(session: nox.Session) -> None:
    """The example package, built and installed beside llmft, runs its own tests."""
    install(session, "tests")
    session.install(*CONSTRAINTS, "examples/llmft-plugin-hello[tests]")
    session.run("pytest", "-c", "pyproject.toml", "examples/llmft-plugin-hello/tests", env=environment(session))


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, mypy --strict, and who may import whom."""
    install(session, "lint", "tests")  # mypy reads the test kit, which imports pytest
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel and the source distribution into dist/."""
    session.install(*CONSTRAINTS, "build", "hatchling")
    session.run("python", "-m", "build", "--no-isolation", "--outdir", os.fspath(Path("dist")))
