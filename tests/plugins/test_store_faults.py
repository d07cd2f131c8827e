"""What both of the stores' protocols have to outlive or to say, each through the proxy before its real server."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, Proxy, fault_proxy, google_refusal
from servers import GcsServer
from stores import Store
from transfers import CATALOG, MIB

from llmft_core import InputError, LlmftError
from llmft_core.cli.main import main
from llmft_core.storage import faults, transfer
from llmft_core.storage.engine import Budget
from llmft_core.storage.places import Place, Places

LARGE = 11 * MIB
PARTS = Budget(concurrency=2, chunk=5 * MIB)


def writes(head: bytes) -> bool:
    return head.split(b" ", 1)[0] in (b"PUT", b"POST", b"DELETE", b"PATCH")


# --- 503 ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("doing", "size"), [("upload", 1000), ("upload", LARGE), ("download", LARGE), ("control file", 1000)]
)
def test_eight_seconds_of_503_are_outlived(store: Store, tmp_path: Path, doing: str, size: int) -> None:
    """With the real waits."""
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    remote = store.folder / "file"
    if doing == "download":
        transfer.upload(tmp_path / "source", remote)
    until = time.monotonic() + 8
    store.proxy.faults = [Fault(lambda head: time.monotonic() < until, 10_000, status_503=True)]
    if doing == "upload":
        transfer.upload_many([(tmp_path / "source", remote)], budget=PARTS)
    elif doing == "control file":
        transfer.write_bytes(remote, content)
    else:
        transfer.download_many([(remote, tmp_path / "copy", None)], budget=PARTS)
        assert (tmp_path / "copy").read_bytes() == content
    assert store.proxy.faults[0].times < 10_000, "it was busy"
    assert time.monotonic() > until
    assert transfer.read_bytes(remote) == content


# --- permission only to read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, LARGE], ids=["small", "parts"])
def test_who_may_only_read_reads_and_is_told_so_once(store: Store, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    there, new = store.folder / "there", store.folder / "new"
    transfer.upload_many([(tmp_path / "source", there)], budget=PARTS)
    before = len(store.proxy.heads)
    store.proxy.faults = [Fault(writes, 10_000, answer=store.refused("403 Forbidden", "AccessDenied"))]
    actions: list[Callable[[], Any]] = [
        lambda: transfer.upload_many([(tmp_path / "source", new)], budget=Budget(1, 5 * MIB)),
        lambda: transfer.write_bytes(new, b"{}"),
        lambda: transfer.delete(there),
    ]
    for action in actions:
        with pytest.raises(InputError, match=r"access denied .*bucket") as caught:
            action()
        assert "\n" not in str(caught.value)
    assert sum(map(writes, store.proxy.heads[before:])) == len(actions), "nothing was tried again"
    assert transfer.list_files(store.folder) == {"there": size}
    assert transfer.download_many([(there, tmp_path / "copy", None)], budget=PARTS)
    assert (tmp_path / "copy").read_bytes() == content


def test_a_check_names_the_permission(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.proxy.faults = [Fault(writes, 10_000, answer=store.refused("403 Forbidden", "AccessDenied"))]
    assert main(["storage", "check", *store.flags, "--size", "0"]) == 1
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1}
    assert lines["write"].startswith("wrong")
    assert "refused: " in lines["write"]
    assert lines["list"].startswith("ok")
    assert "leftovers" not in lines, "nothing can have been written"


# --- Retry-After --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Slow Down"])
def test_a_store_that_asks_to_wait_is_given_the_time(
    store: Store, tmp_path: Path, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(faults, "sleep", waits.append)
    content = b"content"
    (tmp_path / "source").write_bytes(content)
    remote = store.folder / "file"
    busy = store.refused(status, "SlowDown", "Retry-After: 7")
    store.proxy.faults = [Fault(writes, 1, answer=busy)]
    transfer.upload(tmp_path / "source", remote)
    assert sum(waits) == pytest.approx(7)
    waits.clear()
    store.proxy.faults = [Fault(lambda head: head.startswith((b"GET ", b"HEAD ")), 1, answer=busy)]
    transfer.download(remote, tmp_path / "copy")
    assert sum(waits) == pytest.approx(7)
    waits.clear()
    forever = store.refused(status, "SlowDown", "Retry-After: 3600")
    store.proxy.faults = [Fault(writes, 99, answer=forever)]
    with pytest.raises(LlmftError, match="keeps failing"):
        transfer.upload(tmp_path / "source", remote)
    assert waits == [], "longer than anybody would wait: said at once"


# --- Google's credentials -----------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Google's token server: what it was asked, and how it answers."""

    url: str = ""
    asked: int = 0
    statuses: list[int] = field(default_factory=list)
    """Of the answers to come; 200 when there are none left."""


@contextmanager
def token_server() -> Iterator[Tokens]:
    tokens = Tokens()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            tokens.asked += 1
            status = tokens.statuses.pop(0) if tokens.statuses else 200
            told = {"access_token": f"token-{tokens.asked}", "expires_in": 3600, "token_type": "Bearer"}
            body = json.dumps(told if status == 200 else {"error": "invalid_grant"}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    tokens.url = f"http://127.0.0.1:{server.server_address[1]}/token"
    try:
        yield tokens
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def key_file(path: Path, token_url: str) -> Path:
    """A service account's key, made now."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {"type": "service_account", "project_id": "p", "private_key_id": "1", "private_key": pem}
    account |= {"client_email": "a@p.iam.gserviceaccount.com", "client_id": "1", "token_uri": token_url}
    path.write_text(json.dumps(account))
    return path


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tokens]:
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)
    with token_server() as running:
        key = key_file(tmp_path / "key.json", running.url)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
        yield running


def google_place(proxy: Proxy, test: str) -> Place:
    options = {"bucket": "bucket", "prefix": test, "endpoint-url": proxy.url}
    return Places(CATALOG, {"name": "gcs", **options}, {}).runs() / "file"


def test_google_s_token_is_refreshed_on_the_way(gcs_server: GcsServer, tokens: Tokens, tmp_path: Path) -> None:
    """A token that the store no longer takes in the middle of an upload: the part is sent again, whole."""
    content = os.urandom(3 * MIB)
    (tmp_path / "source").write_bytes(content)
    with fault_proxy(gcs_server.endpoint_url) as proxy:
        remote = google_place(proxy, "refreshed")
        expired = google_refusal("401 Unauthorized", "Invalid Credentials")
        proxy.faults = [Fault(lambda head: head.startswith(b"POST /upload/") and b"00002" in head, 1, answer=expired)]
        transfer.upload_many([(tmp_path / "source", remote)], budget=Budget(1, MIB))
        assert tokens_used(proxy) == [b"token-1", b"token-2"]
        transfer.download(remote, tmp_path / "copy")
        assert tokens_used(proxy) == [b"token-1", b"token-2", b"token-3"], "the third for the reads' own client"
    assert (tmp_path / "copy").read_bytes() == content


def tokens_used(proxy: Proxy) -> list[bytes]:
    used = [head.lower().partition(b"authorization: bearer ")[2].split(b"\r\n")[0] for head in proxy.heads]
    return list(dict.fromkeys(used))


def test_a_token_server_that_is_busy_is_asked_again(gcs_server: GcsServer, tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")
    with fault_proxy(gcs_server.endpoint_url) as proxy:
        remote = google_place(proxy, "busy-tokens")
        tokens.statuses = [503] * 4
        transfer.upload(tmp_path / "source", remote)
        assert tokens.statuses == [], "it was asked until it answered"
        assert tokens_used(proxy)[0] == b"token-5", "four were refused"
        assert transfer.exists(remote)


def test_a_key_that_google_does_not_take_is_the_user_s_affair(
    gcs_server: GcsServer, tokens: Tokens, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(b"content")
    with fault_proxy(gcs_server.endpoint_url) as proxy:
        tokens.statuses = [400] * 100
        with pytest.raises(InputError, match=r"does not accept the credentials .*GOOGLE_APPLICATION_CREDENTIALS"):
            transfer.upload(tmp_path / "source", google_place(proxy, "wrong-key"))
        assert proxy.heads == []
