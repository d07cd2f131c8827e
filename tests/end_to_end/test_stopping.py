"""Ctrl-C and SIGTERM: once, and a run ends with a state from which it goes on to the same bytes; twice, and it ends."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from command import llmft
from fault_proxy import fault_proxy
from hold import Hold
from running import Running, orphans_adopted
from servers import S3Server

STEPS = 6
# A step is one forward pass of each rank; the epoch ends within them.
SHORT = ["--dataset.rows", "32", "--dataset.test-rows", "8", "--global-batch", "8", "--max-steps", str(STEPS)]
# A step takes seconds.
LONG = ["--dataset.rows", "64", "--dataset.test-rows", "8", "--global-batch", "64", "--epochs", "1000"]
NEVER = ["--checkpoint.every-epochs", "0", "--state.every-minutes", "0"]
HERE = ("--workers", "0")
ON_RAY = ("--workers", "2", "--strategy", "zero-3")

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
NAMES = {signal.SIGINT: "the user", signal.SIGTERM: "SIGTERM"}
SAID = {
    signal.SIGINT: "stopping: saving a state after this step; press Ctrl-C again to stop at once",
    signal.SIGTERM: "SIGTERM: saving a state after this step; send it once more to stop at once",
}

Start = Callable[..., Running]


@pytest.fixture(scope="module", autouse=True)
def _orphans_adopted() -> Iterator[None]:
    with orphans_adopted():
        yield


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """The folder of a run with such workers that nobody stopped; each is made once."""

    @cache
    def run(workers: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        hold = Hold(folder, in_pass=0)
        hold.release()  # it is the same plan
        command = ["run", *SHORT, *NEVER, *workers, *hold.flags, "--name", "straight"]
        answer = llmft(*command, folder=folder, environment=hold.environment)
        assert answer.code == 0, answer.err
        return folder / "llmft-runs" / "runs" / "straight"

    return run


def send(sent: signal.Signals, running: Running) -> None:
    """Ctrl-C goes to all processes of a terminal, SIGTERM to the driver alone."""
    if sent == signal.SIGINT:
        running.ctrl_c()
    else:
        running.look()
        running.process.send_signal(sent)


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train/loss"]) for line in lines]


def last_weights(run: Path) -> bytes:
    return sorted(run.glob("checkpoint_*/model.safetensors"))[-1].read_bytes()


@pytest.mark.parametrize(
    ("workers", "sent"),
    [
        pytest.param(HERE, signal.SIGINT, id="ctrl-c-here"),
        # Of SIGTERM alone is how the driver is told, which on Ray is more.
        pytest.param(HERE, signal.SIGTERM, id="sigterm-here", marks=pytest.mark.slow),
        pytest.param(ON_RAY, signal.SIGINT, id="ctrl-c-on-ray"),
        pytest.param(ON_RAY, signal.SIGTERM, id="sigterm-on-ray"),
    ],
)
@pytest.mark.timeout(1500)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    workers: tuple[str, ...],
    sent: signal.Signals,
    undisturbed: Callable[[tuple[str, ...]], Path],
    start: Start,
    tmp_path: Path,
) -> None:
    straight = undisturbed(workers)
    hold = Hold(tmp_path, in_pass=1, until_told=True)
    running = start(*SHORT, *NEVER, *workers, *hold.flags, "--name", "stopped", **hold.environment)
    hold.wait(running)
    running.wait_for("step 1/")
    send(sent, running)
    running.wait_for(SAID[sent])
    hold.release()
    assert running.end() == CODES[sent], running.text
    assert running.text.count(SAID[sent]) == 1
    assert re.search(
        rf"llmft: interrupted: stopped by {NAMES[sent]} after optimizer step 2 of {STEPS}: "
        r"`llmft resume \S+/stopped` goes on from state_00000",
        running.text,
    ), running.text
    assert "Traceback" not in running.text
    run = tmp_path / "llmft-runs" / "runs" / "stopped"
    assert (run / "state_00000" / ".is_state").is_file()
    assert json.loads((run / "state_00000" / "progress.json").read_text())["step"] == 2
    assert not list(run.rglob("manifest.part-*"))
    assert not (run / "lease.json").exists()
    assert losses(run)[-1][0] == 2, "the step is done and told before the run ends"

    resumed = llmft("resume", "llmft-runs/runs/stopped", folder=tmp_path, environment=hold.environment)
    assert resumed.code == 0, resumed.err
    assert losses(run) == losses(straight)
    assert last_weights(run) == last_weights(straight)


@pytest.mark.parametrize(
    ("workers", "sent"),
    [("0", signal.SIGINT), ("2", signal.SIGINT), pytest.param("2", signal.SIGTERM, marks=pytest.mark.slow)],
    ids=["ctrl-c-here", "ctrl-c-on-ray", "sigterm-on-ray"],
)
def test_twice_stops_at_once(workers: str, sent: signal.Signals, start: Start, tmp_path: Path) -> None:
    """In the middle of a step that would never end. The run's processes are gone when it ends: see `Running.end`."""
    hold = Hold(tmp_path, in_pass=1)
    running = start(*SHORT, *NEVER, "--workers", workers, *hold.flags, "--name", "x", **hold.environment)
    hold.wait(running)
    running.wait_for("step 1/")
    send(sent, running)
    running.wait_for(SAID[sent])
    send(sent, running)
    assert running.end() == CODES[sent], running.text
    assert f"llmft: interrupted: stopped by {NAMES[sent]} after optimizer step " in running.text
    assert "Traceback" not in running.text
    run = tmp_path / "llmft-runs" / "runs" / "x"
    assert not (run / "lease.json").exists()
    assert not list(run.rglob(".is_checkpoint"))
    assert not list(run.rglob(".is_state"))
    assert "goes on from state_" not in running.text


def test_before_the_first_step_once_stops_at_once(start: Start, tmp_path: Path) -> None:
    hold = Hold(tmp_path, in_pass=0)
    running = start(*SHORT, *NEVER, "--workers", "0", *hold.flags, "--name", "x", **hold.environment)
    hold.wait(running)
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
