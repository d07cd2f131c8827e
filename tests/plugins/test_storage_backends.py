"""S3 and GCS on real servers: transfers, and what a user reads when something is wrong."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from servers import GcsServer, S3Server, free_port

from llmft_core.catalog import Catalog
from llmft_core.errors import InputError, LlmftError
from llmft_core.loading import load_plugins
from llmft_core.storage import check_storage, faults, transfer
from llmft_core.storage.places import Place, Places
from llmft_plugins.storage import gcs_client, s3

CATALOG = Catalog(load_plugins())


def runs(name: str, **options: Any) -> Place:
    """Where runs lie, for options in Python's spelling."""
    return Places(
        CATALOG, {"name": name, **{key.replace("_", "-"): value for key, value in options.items()}}, {}
    ).runs()


@pytest.fixture
def s3_runs(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    """`runs` on rclone, with its key in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return lambda **options: runs(
        "s3", **{"bucket": s3_server.bucket, "endpoint_url": s3_server.endpoint_url, **options}
    )


@pytest.fixture(params=["rclone", "moto", "gcs"])
def folder(request: pytest.FixtureRequest, own_name: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder in each of the servers."""
    prefix = f"round/{own_name}"
    if request.param == "gcs":
        emulator: GcsServer = request.getfixturevalue("gcs_server")
        return runs("gcs", bucket=emulator.bucket, prefix=prefix, endpoint_url=emulator.endpoint_url, anonymous=True)
    server: S3Server = request.getfixturevalue("s3_server" if request.param == "rclone" else "moto_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return runs("s3", bucket=server.bucket, prefix=prefix, endpoint_url=server.endpoint_url)


def one_line(error: pytest.ExceptionInfo[LlmftError], *parts: str, exit_code: int = 2) -> None:
    """The message is one line with all of these parts, and the process would end with this code."""
    line = str(error.value)
    assert "\n" not in line
    assert [part for part in parts if part not in line] == [], line
    assert error.value.exit_code == exit_code


# --- transfers --------------------------------------------------------------------------------------------------


def test_round_trip(folder: Place, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(18 * 2**20 + 3))  # more than one block
    assert transfer.list_files(folder) == {}
    assert not transfer.exists(folder)
    sent = transfer.upload(source, folder / "a/big.bin")
    transfer.write_bytes(folder / "small.json", b"{}")
    transfer.write_bytes(folder / "empty", b"")
    assert transfer.list_files(folder) == {"a/big.bin": source.stat().st_size, "empty": 0, "small.json": 2}
    assert transfer.download(folder / "a/big.bin", tmp_path / "copy") == sent
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert transfer.read_bytes(folder / "a/big.bin", limit=10) == source.read_bytes()[:10]
    assert transfer.read_bytes(folder / "empty", limit=10) == transfer.read_bytes(folder / "empty") == b""
    with transfer.open_read(folder / "a/big.bin") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == source.read_bytes()[-3:]
    assert transfer.exists(folder / "a")
    transfer.delete(folder / "a/big.bin")
    transfer.delete(folder / "a/big.bin")
    assert list(transfer.list_files(folder)) == ["empty", "small.json"]


def test_probe_leaves_nothing(folder: Place) -> None:
    check_storage.probe(folder)
    assert transfer.list_files(folder) == {}


def test_a_listing_is_never_stale(folder: Place) -> None:
    """Another process writes between two listings."""
    transfer.write_bytes(folder / "a", b"1")
    assert list(transfer.list_files(folder)) == ["a"]
    transfer.write_bytes(pickle.loads(pickle.dumps(folder)) / "b", b"1")
    assert list(transfer.list_files(folder)) == ["a", "b"]
    assert transfer.exists(folder / "b")


def test_the_filesystem_travels_to_other_processes(folder: Place) -> None:
    """As Ray Train sends it."""
    transfer.write_bytes(folder / "a", b"1")
    assert pickle.loads(pickle.dumps(folder.fs)).cat_file(f"{folder.path}/a") == b"1"


def test_a_missing_object(folder: Place, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        transfer.download(folder / "no", tmp_path / "target")
    one_line(caught, f"{folder.uri}/no", "no such object")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_bucket(folder: Place) -> None:
    nowhere = Place(folder.backend, "no-such-bucket/runs")
    for action in (check_storage.probe, transfer.list_files):
        with pytest.raises(InputError) as caught:
            action(nowhere)
        one_line(caught, "no bucket no-such-bucket", "--storage.bucket")


def test_what_s3_holds_is_what_was_sent(s3_runs: Callable[..., Place], s3_server: S3Server, tmp_path: Path) -> None:
    """The file on the server's disk, not as the server tells it."""
    (tmp_path / "source").write_bytes(os.urandom(1000))
    sent = transfer.upload(tmp_path / "source", s3_runs(prefix="disk") / "x")
    assert s3_server.folder is not None
    stored = (s3_server.folder / "disk" / "runs" / "x").read_bytes()
    assert hashlib.sha256(stored).hexdigest() == sent


# --- what is wrong with S3 --------------------------------------------------------------------------------------


def test_a_wrong_secret(s3_runs: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError) as caught:
        check_storage.probe(s3_runs())
    one_line(caught, "cannot write to storage: s3://bucket/runs", "does not accept", "AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError) as caught:
        transfer.exists(s3_runs() / "x")
    one_line(caught, "access denied", "AWS_ACCESS_KEY_ID")


def test_no_credentials_never_means_anonymous(s3_runs: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError) as caught:
        check_storage.probe(s3_runs())
    one_line(caught, "no AWS credentials were found", "AWS_ACCESS_KEY_ID", "--storage.profile", "--storage.anonymous")


def test_an_unknown_profile(s3_runs: Callable[..., Place]) -> None:
    with pytest.raises(InputError) as caught:
        check_storage.probe(s3_runs(profile="nobody"))
    one_line(caught, "nobody", "--storage.profile")


def test_anonymous_is_sent_without_a_key(s3_runs: Callable[..., Place]) -> None:
    assert s3_runs(anonymous=True).fs.anon
    with pytest.raises(InputError) as caught:
        check_storage.probe(s3_runs(anonymous=True))
    one_line(caught, "cannot write to storage: s3://bucket/runs")


def test_nobody_listens(s3_runs: Callable[..., Place]) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(InputError) as caught:
        check_storage.probe(s3_runs(endpoint_url=endpoint))
    one_line(caught, f"cannot reach {endpoint} ([Errno 111] Conn", "--storage.endpoint-url")


def test_a_silent_server(s3_runs: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts and says nothing."""
    monkeypatch.setattr(s3, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)
    monkeypatch.setattr(check_storage, "PATIENCE", faults.Patience(attempts=1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = s3_runs(endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(LlmftError) as caught:
            transfer.read_bytes(place / "x")
        one_line(caught, "did not answer in time", exit_code=1)
        with pytest.raises(InputError) as refused:
            check_storage.probe(place)
        one_line(refused, "cannot write to storage", "did not answer in time")


class Failing(BaseHTTPRequestHandler):
    """Answers 503 so many times, then takes what it is given."""

    protocol_version = "HTTP/1.1"  # which answers `Expect: 100-continue`
    failures = 0
    requests = 0

    def do_PUT(self) -> None:
        type(self).requests += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        busy = type(self).failures > 0
        type(self).failures -= 1
        self.send_response(503 if busy else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], str]]:
    """Starts the server above; waits between attempts take no time."""
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()

    def start(failures: int) -> str:
        Failing.failures, Failing.requests = failures, 0
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_busy_server_is_asked_again(s3_runs: Callable[..., Place], failing: Callable[[int], str]) -> None:
    transfer.write_bytes(s3_runs(endpoint_url=failing(2)) / "x", b"1")
    assert Failing.requests == 3


def test_a_server_that_stays_busy(s3_runs: Callable[..., Place], failing: Callable[[int], str]) -> None:
    with pytest.raises(LlmftError) as caught:
        transfer.write_bytes(s3_runs(endpoint_url=failing(1000)) / "x", b"1")
    one_line(caught, "s3://bucket/runs/x", "keeps failing", "try again later", exit_code=1)
    assert 4 <= Failing.requests <= 8


def test_checksums_are_botocores_own_for_aws_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "request_checksum_calculation" not in runs("s3", bucket="b").fs.config_kwargs
    assert runs("s3", bucket="b", endpoint_url="http://x").fs.config_kwargs["request_checksum_calculation"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://x")
    assert runs("s3", bucket="b").fs.config_kwargs["response_checksum_validation"] == "when_required"


# --- what is wrong with GCS -------------------------------------------------------------------------------------


def test_gcs_no_credentials_never_means_anonymous(gcs_server: GcsServer) -> None:
    """The emulator would take an anonymous request."""
    with pytest.raises(InputError) as caught:
        check_storage.probe(runs("gcs", bucket=gcs_server.bucket, endpoint_url=gcs_server.endpoint_url))
    one_line(caught, "no Google Cloud credentials were found", "GOOGLE_APPLICATION_CREDENTIALS", "--storage.anonymous")


def test_gcs_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs_client, "READ_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = runs("gcs", bucket="b", endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}", anonymous=True)
        with pytest.raises(InputError) as caught:
            check_storage.probe(place)
    one_line(caught, "did not answer in time")


def test_gcs_nobody_listens() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(InputError) as caught:
        check_storage.probe(runs("gcs", bucket="b", endpoint_url=endpoint, anonymous=True))
    one_line(caught, f"cannot reach {endpoint} ([Errno 111] Conn", "--storage.endpoint-url")


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (PermissionError("Forbidden: b/o\nno storage.objects.create access"), ("access denied", "Storage Object User")),
        (OSError(28, "No space left on device"), ("disk of this machine is full",)),
        (ConnectionRefusedError("refused"), ("cannot reach Google Cloud Storage",)),
    ],
)
def test_gcs_explains(error: OSError, parts: tuple[str, ...]) -> None:
    place = runs("gcs", bucket="b")
    line = str(faults.explained(place, error))
    assert all(part in line for part in (place.uri, *parts)), line
    assert "\n" not in line
