"""Ctrl-C and SIGTERM: once, and a run ends with a state from which it goes on to the same bytes; twice, and it ends."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import llmft
from fault_proxy import fault_proxy
from running import Running
from servers import S3Server

STEPS = 12
# A step takes about a second of an idle machine, as long as rank 0 needs to be told.
SHORT = ["--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "16", "--max-steps", str(STEPS)]
# A step takes seconds.
LONG = ["--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "64", "--epochs", "1000"]
NEVER = ["--checkpoint.every-epochs", "0", "--state.every-minutes", "0"]

Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `llmft run FLAGS`."""
    started: list[Running] = []

    def begin(*flags: str, **environment: str) -> Running:
        started.append(Running(tmp_path, "run", *flags, environment=environment))
        return started[-1]

    yield begin
    for running in started:
        running.clean_up()


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train/loss"]) for line in lines]


def last_weights(run: Path) -> bytes:
    return sorted(run.glob("checkpoint_*/model.safetensors"))[-1].read_bytes()


@pytest.mark.parametrize(
    ("workers", "sent", "code", "said"),
    [
        (["--workers", "0"], signal.SIGINT, 130, "stopping: saving a state after this step; press Ctrl-C again"),
        (["--workers", "0"], signal.SIGTERM, 143, "SIGTERM: saving a state after this step; send it once more"),
        (
            ["--workers", "2", "--strategy", "zero-3"],
            signal.SIGINT,
            130,
            "stopping: saving a state after this step; press Ctrl-C again",
        ),
    ],
    ids=["ctrl-c", "sigterm", "ctrl-c-on-ray"],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    workers: list[str], sent: signal.Signals, code: int, said: str, start: Start, tmp_path: Path
) -> None:
    straight = llmft("run", *SHORT, *NEVER, *workers, "--name", "straight", folder=tmp_path)
    assert straight.code == 0, straight.err
    running = start(*SHORT, *NEVER, *workers, "--name", "stopped")
    running.wait_for("step 1/")
    if sent == signal.SIGINT:
        running.ctrl_c()
    else:
        running.look()
        running.process.send_signal(sent)
    assert running.end() == code, running.text
    assert running.text.count(f"{said} to stop at once") == 1
    who = "the user" if sent == signal.SIGINT else "SIGTERM"
    (step,) = re.findall(
        rf"llmft: interrupted: stopped by {who} after optimizer step (\d+) of {STEPS}: `llmft resume \S+/stopped` goes "
        "on from state_00000",
        running.text,
    )
    assert "Traceback" not in running.text
    run = tmp_path / "llmft-runs" / "runs" / "stopped"
    assert (run / "state_00000" / ".is_state").is_file()
    assert json.loads((run / "state_00000" / "progress.json").read_text())["step"] == int(step) < STEPS
    assert not list(run.rglob("manifest.part-*"))
    assert not (run / "lease.json").exists()
    assert losses(run)[-1][0] == int(step), "the step is done and told before the run ends"

    resumed = llmft("resume", "llmft-runs/runs/stopped", folder=tmp_path)
    assert resumed.code == 0, resumed.err
    assert losses(run) == losses(run.with_name("straight"))
    assert last_weights(run) == last_weights(run.with_name("straight"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_twice_stops_at_once(workers: str, start: Start, tmp_path: Path) -> None:
    running = start(*LONG, *NEVER, "--workers", workers, "--name", "x")
    running.wait_for("step 1/")
    running.ctrl_c()
    running.wait_for("stopping: ")
    running.ctrl_c()
    assert running.end() == 130, running.text
    assert "llmft: interrupted: stopped by the user after optimizer step " in running.text
    assert "Traceback" not in running.text
    run = tmp_path / "llmft-runs" / "runs" / "x"
    assert not (run / "lease.json").exists()
    assert not list(run.rglob(".is_checkpoint"))


def test_before_the_first_step_once_stops_at_once(start: Start, tmp_path: Path) -> None:
    running = start(*LONG, *NEVER, "--workers", "0", "--name", "x")
    running.wait_for("loading the model")
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 143, running.text
    assert "llmft: interrupted: stopped by SIGTERM" in running.text
    assert not list((tmp_path / "llmft-runs").rglob("state_*"))


def test_ctrl_c_while_the_state_is_uploaded_leaves_nothing_that_looks_complete(
    start: Start, s3_server: S3Server, tmp_path: Path
) -> None:
    """The store takes the state's files, and does not answer; then nobody waits for it any more."""
    assert s3_server.folder is not None
    uploading, over = threading.Event(), threading.Event()

    def hold(head: bytes) -> None:
        if head.startswith(b"PUT ") and b"/state_00000/" in head:
            uploading.set()
            over.wait(240)

    with fault_proxy(s3_server.endpoint_url) as proxy:
        proxy.before_answer = hold
        storage = ["--storage", "s3", "--storage.bucket", s3_server.bucket, "--storage.prefix", "stopping"]
        storage += ["--storage.endpoint-url", proxy.url]
        cache = tmp_path / "cache"
        keys = {**s3_server.environment, "LLMFT_CACHE": str(cache)}
        running = start(*LONG, *NEVER, *storage, "--workers", "0", "--name", "held", **keys)
        running.wait_for("step 1/")
        running.ctrl_c()
        assert uploading.wait(240), running.text
        running.ctrl_c()
        assert running.end() == 130, running.text
        over.set()
    assert "no checkpoint was complete yet" in running.text
    run = s3_server.folder / "stopping" / "runs" / "held"
    assert not (run / "state_00000" / ".is_state").exists()
    assert not (run / "lease.json").exists()
    assert not list((cache / "staging").glob("*.partial"))
