"""Whether a plan resumes exactly: it is run in miniature, once straight and once killed and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmft_core.checkpoint.stored import list_checkpoints, read_manifest
from llmft_core.errors import LlmftError
from llmft_core.plan import CheckpointOptions, Choice, RunPlan, StateOptions
from llmft_core.storage.places import Place, Places
from llmft_core.storage.transfer import delete_folder, read_bytes

PROGRAM = "from llmft_core.cli.main import entry_point; entry_point()"
POLL_SECONDS = 0.05
Say = Callable[[str], None]


@dataclass(frozen=True)
class Verdict:
    """What the two runs had in common."""

    at: int
    """Optimizer steps before the state."""
    losses: Mapping[int, tuple[float, float]]
    """Step, counted from 1 → its loss in the straight run and in the one that was gone on with."""
    weights: Mapping[str, tuple[str, str]]
    """File of the last checkpoint → its SHA-256 in the two runs."""
    kept: tuple[str, ...]
    """URIs of the two runs, where they differ and are kept to be looked at."""

    @property
    def exact(self) -> bool:
        """Whether every loss after the state and every byte of the weights is the same."""
        return all(one == other for one, other in (*self.losses.values(), *self.weights.values()))

    def lines(self) -> list[str]:
        """For people."""
        steps = max(self.losses)
        differing = {step: pair for step, pair in self.losses.items() if pair[0] != pair[1]}
        files = [name for name, (one, other) in self.weights.items() if one != other]
        what = f"{steps} optimizer steps straight, against {self.at} of them, kill, resume to {steps}"
        if self.exact:
            same = f"losses of steps {self.at + 1} to {steps} and {len(self.weights)} weight file(s): the same bits"
            return [f"exact: {what}; {same}"]
        lines = [f"not exact: {what}"]
        if differing:
            step, (one, other) = min(differing.items())
            lines.append(f"first at step {step}: loss {one!r} straight, {other!r} after the resume")
        if files:
            lines.append(f"weights that differ: {', '.join(sorted(files))}")
        lines.append(f"both runs are kept: {' '.join(self.kept)}; on GPUs, --deterministic chooses exact kernels")
        return lines


def in_miniature(plan: RunPlan, name: str, steps: int) -> RunPlan:
    """The plan for so many optimizer steps, with one state in the middle and one checkpoint at the end."""
    return plan.model_copy(
        update={
            "name": name,
            "epochs": None,
            "max_steps": steps,
            "smoke_test": False,
            "eval_every_steps": 0,
            "max_failures": 0,
            "tracker": [{"name": "jsonl"}],
            "checkpoint": CheckpointOptions.model_validate({"every-epochs": 0, "dtype": plan.checkpoint.dtype}),
            "state": StateOptions.model_validate({"every-steps": (steps + 1) // 2, "every-minutes": 0}),
        }
    )


def verify_resume(plan: RunPlan, places: Places, steps: int, say: Say) -> Verdict:
    """Runs in the plan's own storage and cluster; the two runs are removed again unless they differ. Raises LlmftError
    where one of them fails."""
    stem = f"verify-resume-{uuid.uuid4().hex[:8]}"
    runs = [places.runs() / f"{stem}-{kind}" for kind in ("straight", "resumed")]
    at = (steps + 1) // 2
    with tempfile.TemporaryDirectory(prefix="llmft-verify-") as scratch:
        files = []
        for run in runs:
            file = Path(scratch) / f"{run.name}.json"  # JSON is YAML
            file.write_text(json.dumps(in_miniature(plan, run.name, steps).to_json()))
            files.append(file)
        say(f"{steps} optimizer steps straight")
        call(["run", "--plan", str(files[0])], files[0].with_suffix(".log"))
        say(f"the same again, killed once the state of step {at} is complete")
        call(["run", "--plan", str(files[1])], files[1].with_suffix(".log"), kill_at="state_00000 complete")
        say("and gone on with")
        call(["resume", (runs[1] / "state_00000").uri, *reach(plan.storage)], files[1].with_suffix(".resumed.log"))
    verdict = compare(runs, at)
    if verdict.exact:
        for run in runs:
            delete_folder(run)
    return verdict


def reach(storage: Choice) -> list[str]:
    """The flags by which `llmft resume` finds a run before it has read the run's own plan."""
    given = {f"--backends.{storage['name']}.{key}": value for key, value in storage.items() if key != "name" and value}
    return [flag if value is True else f"{flag}={value}" for flag, value in given.items()]


def compare(runs: Sequence[Place], at: int) -> Verdict:
    """What the runs wrote: `metrics.jsonl` and the newest complete checkpoint."""
    logged: list[dict[int, float]] = []
    hashes: list[dict[str, str]] = []
    for run in runs:
        lines = map(json.loads, read_bytes(run / "metrics.jsonl").decode().splitlines())
        logged.append({line["step"]: line["train/loss"] for line in lines if line["step"] > at})
        place = [one.place for one in list_checkpoints(run) if one.complete][-1]
        found = read_manifest(place)["files"]
        hashes.append({name: file["sha256"] for name, file in found.items() if name.endswith(".safetensors")})
    losses = {step: (loss, logged[1].get(step, float("nan"))) for step, loss in logged[0].items()}
    weights = {name: (digest, hashes[1].get(name, "missing")) for name, digest in hashes[0].items()}
    verdict = Verdict(at, losses, weights, ())
    return verdict if verdict.exact else Verdict(at, losses, weights, tuple(run.uri for run in runs))


def call(arguments: list[str], log: Path, kill_at: str = "") -> None:
    """llmft in a process of its own, killed as soon as its output has `kill_at`. Raises LlmftError where it fails."""
    # The plan is whole; nothing of the environment may be stronger.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLMFT_") or k == "LLMFT_CACHE"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                if kill_at and kill_at in log.read_text(errors="replace"):
                    process.kill()  # SIGKILL: nothing is tidied up
                    process.wait()
                    return
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        said = last[0].removeprefix("llmft: error: ") if last else "it said nothing"
        raise LlmftError(f"the run in miniature failed: {said}: does `llmft run --smoke-test` with these flags work?")
