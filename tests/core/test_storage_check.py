"""`llmft storage check` and `--plan URI` on real servers: what is said, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import Fault, Proxy, fault_proxy, refusal
from servers import GcsServer, S3Server

from llmft_core.catalog import Catalog
from llmft_core.cli.main import main
from llmft_core.loading import load_plugins
from llmft_core.storage import faults, transfer
from llmft_core.storage.check_storage import clock_finding
from llmft_core.storage.places import Place, Places

FORBIDDEN = refusal("403 Forbidden", "AccessDenied")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)
    return tmp_path


def flags_for(server: S3Server, monkeypatch: pytest.MonkeyPatch, prefix: str, url: str = "") -> list[str]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    at = ["--storage.bucket", server.bucket, "--storage.endpoint-url", url or server.endpoint_url]
    return ["--storage", "s3", *at, "--storage.prefix", prefix]


def at(server: S3Server, path: str) -> Place:
    return Places(Catalog(load_plugins()), None, {"s3": {"endpoint-url": server.endpoint_url}}).place(
        f"s3://bucket/{path}"
    )


def check(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, str], str]:
    """Exit code, `what` → its line, standard error."""
    code = main(["storage", "check", *flags])
    said = capsys.readouterr()
    return code, {line.split()[1]: line for line in said.out.splitlines() if len(line.split()) > 1}, said.err


STEPS = ("write", "read", "list", "clock", "create", "latency", "upload", "download", "delete")


@pytest.mark.parametrize("server", ["rclone", "moto", "gcs", "local"])
def test_all_is_well(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: Place | None = None
    if server == "gcs":
        emulator: GcsServer = request.getfixturevalue("gcs_server")
        options = {"bucket": emulator.bucket, "prefix": "check", "endpoint-url": emulator.endpoint_url}
        flags = ["--storage", "gcs", "--storage.anonymous"]
        flags += [word for name, value in options.items() for word in (f"--storage.{name}", value)]
        left = Places(Catalog(load_plugins()), {"name": "gcs", "anonymous": True, **options}, {}).runs()
    elif server == "local":
        flags = ["--storage.root", "new"]
    else:
        s3: S3Server = request.getfixturevalue("s3_server" if server == "rclone" else "moto_server")
        flags = flags_for(s3, monkeypatch, "check")
        left = at(s3, "check")
    code, lines, _ = check(capsys, *flags, "--size", "9")
    assert code == 0
    for step in STEPS:
        # rclone and the emulator of Google are known to ignore the condition of a conditional write
        state = "note" if step == "create" and server in ("rclone", "gcs") else "ok"
        assert lines[step].split()[0] == state, lines[step]
    assert ("kept apart only by a lease" in lines["create"]) == (server in ("rclone", "gcs"))
    if left is None:
        assert not Path("new").exists()
    else:
        assert transfer.list_files(left) == {}


@pytest.mark.parametrize(
    ("method", "state"),
    [
        (b"PUT", {"write": "wrong", "list": "ok", "rest": "unknown"}),
        (b"DELETE", {"write": "ok", "read": "ok", "list": "ok", "delete": "wrong"}),
    ],
)
def test_a_permission_that_is_missing_is_named(
    method: bytes,
    state: dict[str, str],
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The proxy refuses in the server's name: none of the servers here has permissions."""
    with fault_proxy(s3_server.endpoint_url) as proxy:
        proxy.faults = [Fault(lambda head: head.startswith(method), 1000, answer=FORBIDDEN)]
        flags = flags_for(s3_server, monkeypatch, f"refused-{method.decode()}", proxy.url)
        code, lines, _ = check(capsys, *flags, "--size", "0")
    assert code == 1
    assert {step: lines[step].split()[0] for step in state} == state
    wrong = next(lines[step] for step in state if state[step] == "wrong")
    assert "refused: " in wrong
    assert "without it" in wrong
    assert ("leftovers" in lines) == (method == b"DELETE")


def test_a_wrong_secret_and_a_missing_bucket(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_for(s3_server, monkeypatch, "x")
    code, lines, _ = check(capsys, *flags, "--storage.bucket", "nobody")
    assert code == 1
    assert "has no bucket nobody" in lines["write"]
    assert "list, delete: not tried" in lines["rest"]
    assert "leftovers" not in lines
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    code, lines, _ = check(capsys, *flags)
    assert code == 1
    assert "does not accept the access key or its secret" in lines["write"]


def test_ctrl_c_leaves_nothing(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while the large file goes up in parts: neither probes nor parts stay in the bucket."""
    with fault_proxy(s3_server.endpoint_url) as proxy:
        flags = flags_for(s3_server, monkeypatch, "interrupted", proxy.url)
        started: list[subprocess.Popen[str]] = []

        def interrupt(head: bytes) -> None:
            if b"partNumber=3" in head and head.startswith(b"PUT ") and started:
                started.pop().send_signal(signal.SIGINT)

        proxy.before_answer = interrupt
        command = [
            sys.executable,
            "-c",
            # where the tests run in the background of a shell, SIGINT is ignored, and children inherit that
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from llmft_core.cli.main import main; sys.exit(main(sys.argv[1:]))",
        ]
        process = subprocess.Popen(
            [*command, "storage", "check", *flags], stderr=subprocess.PIPE, text=True, env={**os.environ}
        )
        started.append(process)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "llmft: interrupted" in err
    left = at(s3_server, "interrupted")
    assert transfer.list_files(left) == {}
    large = [head for head in proxy.heads if head.startswith(b"POST ") and b"uploads" in head]
    assert large, "it was interrupted in the middle of an upload"
    path = large[0].split()[1].split(b"?")[0].decode().lstrip("/")
    writes = left.verified_uploads
    assert writes is not None
    assert writes.unfinished(path) is None


@pytest.mark.parametrize(
    ("skew", "state"), [(None, "unknown"), (0.9, "ok"), (-100.0, "note"), (400.0, "wrong"), (-4000.0, "wrong")]
)
def test_clocks(skew: float | None, state: str) -> None:
    found = clock_finding(skew)
    assert found.state == state
    assert ("behind" in found.message) == (skew == 400.0)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "no action is given; there is check"),
        (["chek"], "did you mean check?"),
        (["check", "--size", "-1"], "--size -1: give MiB"),
        (["check", "--storage", "s3"], "storage.bucket: is required"),
        (["check", "--storage", "s4"], "no storage is called s4; there are gcs, local, s3"),
        (["check", "--storage", "s3", "--storage.bukket", "b"], "--storage.bukket: no such flag"),
    ],
)
def test_wrong_words(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", *args]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert all(line.startswith("llmft: error: ") for line in err.splitlines())


# --- a store that asks for patience -----------------------------------------------------------------------------


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with fault_proxy(s3_server.endpoint_url) as running:
        yield running


def test_a_store_that_asks_to_wait_is_given_the_time(
    proxy: Proxy, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags_for(s3_server, monkeypatch, "")
    waits: list[float] = []
    monkeypatch.setattr(faults, "sleep", waits.append)
    busy = refusal("429 Too Many Requests", "TooManyRequests", "Retry-After: 7")
    place = Places(Catalog(load_plugins()), None, {"s3": {"endpoint-url": proxy.url}}).place("s3://bucket/patience/x")
    (tmp_path / "source").write_bytes(b"content")
    proxy.faults = [Fault(lambda head: head.startswith(b"PUT "), 1, answer=busy)]
    transfer.upload(tmp_path / "source", place)
    assert sum(waits) == pytest.approx(7)
    waits.clear()
    proxy.faults = [Fault(lambda head: head.startswith(b"PUT "), 2, answer=busy)]
    transfer.write_bytes(place, b"again")  # through s3fs
    assert sum(waits) >= 7
    assert transfer.read_bytes(place) == b"again"
    # Longer than anybody would wait: said at once.
    waits.clear()
    forever = refusal("429 Too Many Requests", "TooManyRequests", "Retry-After: 3600")
    proxy.faults = [Fault(lambda head: head.startswith(b"PUT "), 99, answer=forever)]
    with pytest.raises(faults.LlmftError, match="keeps failing"):
        transfer.upload(tmp_path / "source", place)
    assert waits == []


# --- plans at a URI ---------------------------------------------------------------------------------------------


def test_a_plan_from_a_bucket(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags_for(s3_server, monkeypatch, "")
    transfer.write_bytes(at(s3_server, "plans/run.yaml"), b"workers: true\n")
    uri = "s3://bucket/plans/run.yaml"
    by_flags = ["--backends.s3.endpoint-url", s3_server.endpoint_url]
    assert main(["plan", "--plan", uri, *by_flags]) == 2
    assert f"workers: True: true and false are no value for this option (from {uri})" in capsys.readouterr().err
    # where the endpoint stands elsewhere
    Path("llmft.yaml").write_text(f"backends: {{s3: {{endpoint-url: '{s3_server.endpoint_url}'}}}}\n")
    assert main(["run", "--plan", uri]) == 2
    assert f"(from {uri})" in capsys.readouterr().err
    Path("llmft.yaml").unlink()
    monkeypatch.setenv("LLMFT_BACKENDS_S3_ENDPOINT_URL", s3_server.endpoint_url)
    assert main(["run", "--plan", uri]) == 2
    assert f"(from {uri})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://bucket/plans/no.yaml", "--plan: s3://bucket/plans/no.yaml: there is no such object in bucket"),
        ("s5://bucket/run.yaml", "s5"),
        ("s3://bucket/../x", "is not a relative path in storage"),
        ("s3://bucket/plans/list.yaml", "a plan is a mapping of options, this is a list"),
        ("file:///no/such.yaml", "there is no such file or folder"),
    ],
)
def test_wrong_plans(
    uri: str,
    said: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags_for(s3_server, monkeypatch, "")
    transfer.write_bytes(at(s3_server, "plans/list.yaml"), b"- 1\n")
    assert main(["plan", "--plan", uri, "--backends.s3.endpoint-url", s3_server.endpoint_url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
