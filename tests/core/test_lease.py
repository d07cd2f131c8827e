"""One process writes a run: the others are refused, a lease that nobody renews is taken over, and its holder told."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from servers import S3Server

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, LlmftError, Terminated
from llmft_core.loading import load_plugins
from llmft_core.preflight import name_problems
from llmft_core.storage import lease as module
from llmft_core.storage.lease import NAME, TTL, Holder, Lease, clear, holder_of, wait_for_a_sign
from llmft_core.storage.places import Place, Places
from llmft_core.train.stopping import Stop


@pytest.fixture
def run(tmp_path: Path) -> Place:
    return Places(Catalog(load_plugins()), None, {}).place(str(tmp_path / "runs" / "x"))


def age(run: Place, seconds: float) -> None:
    """As if the lease had been renewed so long ago."""
    path = Path(run.path) / NAME
    aged = path.with_suffix(".aged")
    aged.write_text(json.dumps({**json.loads(path.read_text()), "renewed": time.time() - seconds}))
    os.replace(aged, path)  # its holder may be reading it


def test_it_is_held_and_given_back(run: Place) -> None:
    with Lease(run, pytest.fail, pytest.fail):
        holder = holder_of(run)
        assert holder is not None
        with pytest.raises(InputError, match=r"is being written by process \d+ on .*: choose another --name"):
            Lease(run, pytest.fail, pytest.fail).__enter__()
    assert holder_of(run) is None
    assert not (Path(run.path) / NAME).exists()


def test_a_stale_one_is_taken_over_and_its_holder_stops(run: Place) -> None:
    told = threading.Event()
    stopped = pytest.raises(LlmftError, match="was taken over by another process")
    with stopped, Lease(run, pytest.fail, told.set) as old:
        age(run, TTL + 1)
        assert holder_of(run) is None
        with Lease(run, pytest.fail, pytest.fail):
            old._every = 0.01
            old._ending.set()  # wakes the thread, which would sleep for a minute
            old._thread.join()
            old._ending.clear()
            old._renew()
            assert told.is_set()
            assert holder_of(run) is not None, "the old one did not write over the new one"


def test_it_is_renewed(run: Place) -> None:
    with Lease(run, pytest.fail, pytest.fail, every=0.01):
        age(run, 200)
        deadline = time.monotonic() + 60
        while (holder := holder_of(run)) is not None and holder.age > 100 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert holder is not None
        assert holder.age < 100, "nobody renewed it"


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_a_lost_lease_stops_the_run_also_where_ctrl_c_is_ignored(ctrl_c: Any) -> None:
    """Shells start background programs with SIGINT ignored. The thread that finds out is not the main one."""

    def run_until_stopped() -> None:
        with Stop() as stop:
            stop.training = True
            threading.Thread(target=stop.at_once).start()
            threading.Event().wait(60)

    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(Terminated):
            run_until_stopped()
    finally:
        signal.signal(signal.SIGINT, before)


def left_by(run: Place, host: str, pid: int, renewed: float, token: str = "other", machine: str = "") -> None:
    """The lease of another process."""
    path = Path(run.path) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".written")
    holder = Holder(token, host, pid, renewed, machine)
    written.write_text(json.dumps(asdict(holder)))
    os.replace(written, path)


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()], ids=["elsewhere", "a number in use again"])
def test_a_holder_that_gives_no_sign_is_dead(run: Place, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock is an hour ahead, so that its lease is stale by this machine's clock alone."""
    left_by(run, host, os.getpid(), time.time() + 3600)
    said: list[str] = []
    with monkeypatch.context() as waiting:
        waiting.setattr(module, "TTL", 0.2)
        dead = wait_for_a_sign(run, said.append)
    assert dead is not None
    assert said == [
        f"{run.uri} belongs to process {os.getpid()} on {host}, last heard of 0 s ago: waiting up to 0 s for a sign of "
        "life of it, and going on with the run if there is none; Ctrl-C stops waiting"
    ]
    with pytest.raises(InputError, match="is being written"):  # who did not wait
        Lease(run, pytest.fail, pytest.fail).__enter__()
    with Lease(run, pytest.fail, pytest.fail, dead=dead):
        with pytest.raises(InputError, match="is being written"):  # who waited too, and comes second
            Lease(run, pytest.fail, pytest.fail, dead=dead).__enter__()
        holder = holder_of(run)
        assert holder is not None
        assert holder.token != dead.token


def test_a_holder_that_lives_is_left_alone(run: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It renews its lease while it is waited for, which ends the waiting; so does another one that comes first."""
    monkeypatch.setattr(module, "LOOK", 0.01)
    for token in ("other", "a third one's"):
        left_by(run, "elsewhere", 1, time.time() - 60)
        with pytest.raises(InputError, match=r"is being written by process 1 on elsewhere, last heard of 0 s ago"):
            wait_for_a_sign(run, lambda _, token=token: left_by(run, "elsewhere", 1, time.time(), token))


def test_a_holder_that_is_known_to_be_gone_is_not_waited_for(run: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK", 0.01)
    assert wait_for_a_sign(run, pytest.fail) is None
    nobody = 2**22 + 1  # no process has such a number
    left_by(run, socket.gethostname(), nobody, time.time(), machine=module.machine())
    assert wait_for_a_sign(run, pytest.fail) is None
    for another in ("", "of another container"):
        left_by(run, socket.gethostname(), nobody, time.time(), machine=another)
        assert holder_of(run) is not None, "the same host name says nothing"
    left_by(run, "elsewhere", 1, time.time() - TTL)
    assert wait_for_a_sign(run, pytest.fail) is None
    left_by(run, "elsewhere", 1, time.time())
    assert wait_for_a_sign(run, lambda _: (Path(run.path) / NAME).unlink()) is None, "it has given it back"


def test_a_lease_without_a_run_keeps_no_name_once_its_holder_is_gone(run: Place) -> None:
    """A process that was killed before it could begin its run."""
    assert name_problems(run) == []
    left_by(run, "elsewhere", 1, time.time())
    (problem,) = name_problems(run)
    assert "is being written by process 1 on elsewhere" in problem.reason
    dead = holder_of(run)
    assert dead is not None
    left_by(run, "elsewhere", 1, time.time(), "a third one's")
    clear(run, dead)
    assert holder_of(run) is not None, "it is another's by now"
    left_by(run, "elsewhere", 1, time.time() - TTL)
    assert name_problems(run) == []
    stale = Holder("other", "elsewhere", 1, 7.0)
    left_by(run, "elsewhere", 1, 7.0)
    clear(run, stale)
    assert list(Path(run.path).iterdir()) == []
    (Path(run.path) / "plan.json").write_text("{}")
    (problem,) = name_problems(run)
    assert problem.reason.endswith("exists already: choose another --name, or remove that run")


def test_what_is_no_lease_is_said(run: Place) -> None:
    Path(run.path).mkdir(parents=True)
    (Path(run.path) / NAME).write_text("{}")
    with pytest.raises(LlmftError, match="is no lease"):
        Lease(run, pytest.fail, pytest.fail).__enter__()


@pytest.mark.parametrize("server", ["rclone", "moto"])
def test_of_several_at_once_one_gets_it(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto keeps the promise of conditional writes; rclone does not, and there the last writer has it."""
    running: S3Server = request.getfixturevalue("s3_server" if server == "rclone" else "moto_server")
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "SETTLE", 4.0)  # a busy machine may hold a thread up for a second
    options = {"s3": {"endpoint-url": running.endpoint_url}}
    run = Places(Catalog(load_plugins()), None, options).place(f"s3://{running.bucket}/leases-{server}/runs/x")
    leases = [Lease(run, pytest.fail, pytest.fail) for _ in range(4)]

    def enter(lease: Lease) -> bool:
        try:
            lease.__enter__()
        except InputError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(enter, leases))
    assert won.count(True) == 1
    leases[won.index(True)].__exit__(None, None, None)
    assert module.holder_of(run) is None
