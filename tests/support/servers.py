"""Real storage servers on loopback for tests: started on a free port, ready when handed out, ended by their own pid.

Which server is good for what is written at each of them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_WITHIN = 60.0  # seconds; Python servers take several on a busy machine


@dataclass(frozen=True)
class S3Server:
    """An S3 endpoint with one bucket. `folder` holds the bucket's files where the server keeps them as files; `pid` is
    the server's process."""

    endpoint_url: str
    access_key: str
    secret_key: str
    bucket: str
    folder: Path | None = None
    pid: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which the ambient credential chain finds this server's key."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@dataclass(frozen=True)
class GcsServer:
    """A Google Cloud Storage endpoint with one bucket; it takes any credentials, and none."""

    endpoint_url: str
    project: str
    bucket: str


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str:
    """Path of a program installed beside this Python."""
    return str(Path(sys.executable).parent / name)


@contextmanager
def serving(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Runs a server until the block ends and yields its pid once `port` accepts connections; its output goes to
    `log`. RuntimeError with the log's end when it does not start."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **(environment or {})}
        )
    try:
        deadline = time.monotonic() + READY_WITHIN
        while not _accepts(port):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{command[0]} did not start (exit code {process.poll()}): {tail}")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _request(method: str, url: str, body: bytes | None = None, kind: str = "application/octet-stream") -> None:
    """One request, repeated while the server is not up behind its open port."""
    deadline = time.monotonic() + READY_WITHIN
    while True:
        request = urllib.request.Request(url, data=body, method=method, headers={"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                response.read()
            return
        except urllib.error.HTTPError as error:
            error.close()
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def rclone_s3(folder: Path) -> Iterator[S3Server]:
    """rclone serving `folder/data` as S3: for transfers, authentication and faults. It checks signatures; a folder in
    `data` is a bucket; files changed behind its back are stale for minutes."""
    data = folder / "data"
    (data / "bucket").mkdir(parents=True)
    config = folder / "rclone.conf"
    config.touch()  # its own empty configuration: never the user's
    port = free_port()
    command = [program("rclone"), "serve", "s3", "--auth-key", "testkey,testsecret", "--addr", f"127.0.0.1:{port}"]
    command += ["--vfs-cache-mode", "off", "--config", str(config), str(data)]
    with serving(command, port, folder / "rclone.log") as pid:
        yield S3Server(f"http://127.0.0.1:{port}", "testkey", "testsecret", "bucket", data / "bucket", pid)


@contextmanager
def moto(folder: Path) -> Iterator[S3Server]:
    """moto_server: for S3 semantics (conditions, 206). Any credentials pass; keep files under 100 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with serving([program("moto_server"), "-H", "127.0.0.1", "-p", str(port)], port, folder / "moto.log"):
        _request("PUT", f"http://127.0.0.1:{port}/bucket")
        yield S3Server(f"http://127.0.0.1:{port}", "testkey", "testsecret", "bucket")


@contextmanager
def gcs_emulator(folder: Path) -> Iterator[GcsServer]:
    """gcp-storage-emulator; use it with `anonymous`. Broken in it: suffix ranges, `mode="create"`, `mv`."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [program("gcp-storage-emulator"), "start", "--host=127.0.0.1", f"--port={port}"]
    environment = {"STORAGE_BASE": str(folder), "STORAGE_DIR": "data"}
    with serving(command, port, folder / "gcs.log", environment):
        url = f"http://127.0.0.1:{port}"
        _request("POST", f"{url}/storage/v1/b?project=p", json.dumps({"name": "bucket"}).encode(), "application/json")
        yield GcsServer(url, "p", "bucket")
