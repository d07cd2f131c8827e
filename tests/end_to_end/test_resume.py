"""`llmft resume`: a killed run goes on, elsewhere, as if nothing had happened; what would change it is refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from command import Answer, llmft
from hold import Hold
from running import Running
from servers import S3Server

from llmft_core.storage.lease import TTL
from llmft_core.verify_resume import Verdict

STEPS = 8
RUN = ["--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "8", "--max-steps", str(STEPS)]
RUN += ["--state.every-steps", "3", "--checkpoint.every-steps", "4", "--workers", "0"]


def killed_after_a_state(folder: Path, flags: list[str], environment: Mapping[str, str]) -> None:
    """Starts a run with `Hold.flags`, and kills it with SIGKILL in its fifth step, once its first state is complete."""
    hold = Hold(folder / "never released", in_pass=4)
    with Running(folder, "run", *flags, environment={**environment, **hold.environment}) as running:
        hold.wait(running)
        running.wait_for("state_00000 complete")
        running.process.kill()
        running.process.wait()


def not_held(folder: Path) -> Mapping[str, str]:
    """The environment of a run with `Hold.flags` that stands still nowhere."""
    hold = Hold(folder, in_pass=0)
    hold.release()
    return hold.environment


def last_weights(run: Path) -> bytes:
    """Of the newest checkpoint: how many there are depends on what was complete when the run was killed."""
    return (max(run.glob("checkpoint_*")) / "model.safetensors").read_bytes()


def losses(text: str) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in map(json.loads, text.splitlines())}


def test_a_killed_run_goes_on_elsewhere_to_the_same_bytes(tmp_path: Path, s3_server: S3Server) -> None:
    """Two undisturbed and disturbed runs in one bucket; the other machine has a cache of its own."""
    assert s3_server.folder is not None
    keys = {**s3_server.environment, "LLMFT_CACHE": str(tmp_path / "one")}
    storage = ["--storage", "s3", "--storage.bucket", "bucket", "--storage.prefix", "resume"]
    storage += ["--storage.endpoint-url", s3_server.endpoint_url]
    straight = llmft("run", *RUN, *storage, "--name", "straight", folder=tmp_path, environment=keys)
    assert straight.code == 0, straight.err
    killed_after_a_state(tmp_path, [*RUN, *storage, *Hold.flags, "--name", "killed"], keys)

    there = {**keys, **not_held(tmp_path), "LLMFT_CACHE": str(tmp_path / "two")}
    reach = ["--backends.s3.endpoint-url", s3_server.endpoint_url]
    resumed = llmft("resume", "s3://bucket/resume/runs/killed", *reach, folder=tmp_path, environment=there)
    assert resumed.code == 0, resumed.err
    assert "restoring the state of step" in resumed.out
    runs = s3_server.folder / "resume" / "runs"
    weights = last_weights(runs / "straight")
    assert last_weights(runs / "killed") == weights
    expected = losses((runs / "straight" / "metrics.jsonl").read_text())
    found = losses((runs / "killed" / "metrics.jsonl").read_text())
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert found == {step: expected[step] for step in found}
    assert set(range(7, STEPS + 1)) <= set(found)
    assert not (runs / "killed" / "lease.json").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `x` that has a state of its third step and the leftovers of a killed process."""
    folder = tmp_path_factory.mktemp("finished")
    answer = llmft("run", *RUN, "--state.keep-last", "9", "--name", "x", folder=folder)
    assert answer.code == 0, answer.err
    return folder


def refused(folder: Path, *args: str) -> list[str]:
    answer: Answer = llmft("resume", *args, folder=folder)
    assert answer.code == 2, answer.out
    return answer.errors


def test_what_would_change_the_run_is_refused(finished: Path) -> None:
    lines = refused(finished, "llmft-runs/runs/x", "--lr", "0.5", "--seed", "7", "--checkpoint.keep-last", "3")
    assert lines == [
        "llmft: error: the run would go on as another one; leave these as they were, or --allow-changes:",
        "llmft: error: lr: 0.002, now 0.5",
        "llmft: error: seed: 0, now 7",
    ]


def test_wrong_places(finished: Path, tmp_path: Path) -> None:
    (line,) = refused(finished)
    assert line.startswith("llmft: error: no run is given: write its folder or URI")
    (line,) = refused(tmp_path, str(tmp_path))
    assert line.endswith("is no run: it has no plan.json: give <root>/runs/NAME, or a state in it")
    (line,) = refused(finished, "llmft-runs/runs/x/state_00007")
    assert "state_00007 is not a complete state (it has no .is_state)" in line
    moved = tmp_path / "elsewhere" / "runs" / "x"
    moved.parent.mkdir(parents=True)
    (finished / "llmft-runs" / "runs" / "x").rename(moved)
    try:
        (line,) = refused(finished, str(moved))
        assert "is not where the run's plan writes" in line
    finally:
        moved.rename(finished / "llmft-runs" / "runs" / "x")


def test_leftovers_of_a_killed_process_are_swept_and_nothing_else(finished: Path) -> None:
    run = finished / "llmft-runs" / "runs" / "x"
    for folder in ("checkpoint_00005", "state_00005", "notes"):
        (run / folder).mkdir()
        (run / folder / "half.safetensors").write_bytes(b"half")
    complete = sorted(path.name for path in run.glob("*_0000[0-4]"))
    answer = llmft("resume", "llmft-runs/runs/x/state_00000", folder=finished)
    assert answer.code == 0, answer.err
    assert "checkpoint_00005 removed: it was never complete" in answer.out
    assert "state_00005 removed: it was never complete" in answer.out
    assert (run / "notes" / "half.safetensors").is_file()
    assert set(complete) <= {path.name for path in run.iterdir()}
    assert (run / "metrics.jsonl").read_text().count("\n") == STEPS


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the run, and the flag that says where it is now."""
    shutil.copytree(finished / "llmft-runs", tmp_path / "copy")
    return tmp_path / "copy" / "runs" / "x", ["--storage.root", str(tmp_path / "copy")]


def test_a_complete_run_is_left_alone_unless_more_is_asked_of_it(
    copied: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run, there = copied
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = llmft("resume", str(run), *there, folder=tmp_path)
    assert again.code == 0, again.err
    (line,) = again.out.splitlines()
    assert line.startswith("the run is complete: ")
    assert "there is nothing left to do" in line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    more = ("resume", str(run), *there, "--max-steps", str(STEPS + 2), "--epochs", "2", "--allow-changes")
    further = llmft(*more, folder=tmp_path)
    assert further.code == 0, further.err
    assert sorted(losses((run / "metrics.jsonl").read_text())) == list(range(1, STEPS + 3))
    done = llmft(*more, folder=tmp_path)
    assert done.code == 2, done.out
    assert f"max-steps: the run has done {STEPS + 2} of {STEPS + 2} optimizer steps: give more" in done.errors[-1]


ELSEWHERE = {"token": "other", "host": "elsewhere", "pid": 1}
"""Whose lease it is."""


def test_a_run_of_a_lost_machine_is_waited_for_and_taken_over(copied: tuple[Path, list[str]], tmp_path: Path) -> None:
    """From a state that is named. Ctrl-C ends the waiting, and the lease is still the other's."""
    run, there = copied
    left = {**ELSEWHERE, "renewed": time.time()}
    (run / "lease.json").write_text(json.dumps(left))
    waiting = Running(tmp_path, "resume", str(run / "state_00000"), *there)
    try:
        waiting.wait_for("for a sign of life of it, and going on with the run if there is none; Ctrl-C stops waiting")
        waiting.ctrl_c()
        assert waiting.end() == 130, waiting.text
    finally:
        waiting.clean_up()
    assert waiting.text.splitlines()[1:] == ["llmft: interrupted"]
    assert json.loads((run / "lease.json").read_text()) == left

    (run / "lease.json").write_text(json.dumps({**left, "renewed": time.time() - TTL + 10}))
    answer = llmft("resume", str(run / "state_00000"), *there, folder=tmp_path)
    assert answer.code == 0, answer.err
    assert "restoring the state of step" in answer.out
    assert not (run / "lease.json").exists()


def test_a_job_that_its_scheduler_starts_again(tmp_path: Path) -> None:
    """The same command each time: begins the run, begins it anew, goes on with it, and has nothing left to do."""
    command, free = ["run", *RUN, *Hold.flags, "--name", "job", "--resume", "auto"], not_held(tmp_path)
    run = tmp_path / "llmft-runs" / "runs" / "job"
    run.mkdir(parents=True)  # its first process came no further than the lease, on a machine that is gone
    (run / "lease.json").write_text(json.dumps({**ELSEWHERE, "renewed": time.time() - TTL + 5}))
    killed_after_a_state(tmp_path, command[1:], {})
    state = (run / "state_00000").rename(tmp_path / "state_00000")  # as if it had been killed before
    for checkpoint in run.glob("checkpoint_*"):
        shutil.rmtree(checkpoint)
    for other in run.glob("state_*"):
        shutil.rmtree(other)
    killed_after_a_state(tmp_path, command[1:], {})
    assert "restoring" not in (tmp_path / "log").read_text()
    again = (run / "state_00000").glob("*.safetensors")
    assert {file.name: file.read_bytes() for file in again} == {
        file.name: file.read_bytes() for file in state.glob("*.safetensors")
    }
    changed = llmft(*command, "--seed", "3", folder=tmp_path, environment=free)
    assert changed.code == 2
    assert changed.errors[0].endswith("was begun with another plan; give what it had, or another --name:")
    assert changed.errors[1:] == ["llmft: error: seed: 0, now 3"]
    resumed = llmft(*command, folder=tmp_path, environment=free)
    assert resumed.code == 0, resumed.err
    assert "restoring the state of step" in resumed.out
    done = llmft(*command, folder=tmp_path, environment=free)
    assert done.code == 0, done.err
    assert done.out.startswith("the run is complete: ")
    nameless = llmft("run", "--resume", "auto", folder=tmp_path)
    assert (nameless.code, len(nameless.errors)) == (2, 1)
    assert "give --name NAME" in nameless.errors[0]


def test_verify_resume_tells_whether_a_plan_is_exact(tmp_path: Path) -> None:
    """In the run's own storage, which is left as it was."""
    flags = ["--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "8", "--workers", "0"]
    answer = llmft("verify-resume", *flags, "--deterministic", "--steps", "3", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == (
        "exact: 3 optimizer steps straight, against 2 of them, kill, resume to 3; losses of steps 3 to 3 and 1 weight "
        "file(s): the same bits"
    )
    assert list((tmp_path / "llmft-runs" / "runs").iterdir()) == []
    few = llmft("verify-resume", *flags, "--steps", "1", folder=tmp_path)
    assert (few.code, len(few.errors)) == (2, 1)
    failed = llmft("verify-resume", *flags, "--model", str(tmp_path), folder=tmp_path)
    assert failed.code == 1
    assert failed.errors[-1].startswith("llmft: error: the run in miniature failed: ")


def test_verify_resume_in_a_bucket(tmp_path: Path, s3_server: S3Server) -> None:
    """How the store is reached is known to all three processes, and nothing stays in it."""
    assert s3_server.folder is not None
    flags = ["--dataset.rows", "16", "--dataset.test-rows", "8", "--global-batch", "8", "--workers", "0"]
    storage = ["--storage", "s3", "--storage.bucket", "bucket", "--storage.prefix", "verify"]
    storage += ["--storage.endpoint-url", s3_server.endpoint_url]
    answer = llmft("verify-resume", *flags, *storage, folder=tmp_path, environment=s3_server.environment)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1].startswith("exact: 6 optimizer steps straight")
    assert not list((s3_server.folder / "verify").rglob("*.safetensors"))


def test_a_verdict_names_the_first_step_that_differs() -> None:
    verdict = Verdict(2, {3: (1.0, 1.0), 4: (0.5, 0.25)}, {"model.safetensors": ("a", "b")}, ("one", "two"))
    assert not verdict.exact
    assert verdict.lines()[1:3] == [
        "first at step 4: loss 0.5 straight, 0.25 after the resume",
        "weights that differ: model.safetensors",
    ]
