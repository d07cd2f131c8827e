"""A Hugging Face hub in a thread: just what `huggingface_hub` asks for, without a network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_good"


@contextmanager
def hub(repositories: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Serves folders as repositories, of models (`owner/name`) and of datasets (`datasets/owner/name`). Yields the
    endpoint and a list that fills with what was asked for (`GET /…`)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, data: object, status: int = 200, **headers: str) -> None:
            self.reply(status, json.dumps(data).encode(), {"Content-Type": "application/json", **headers})

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            asked.append(f"{self.command} {path}")
            api = path.startswith("/api/")
            parts = path.removeprefix("/api").removeprefix("/models").strip("/").split("/")
            named = 3 if parts[0] == "datasets" else 2
            repository, parts = "/".join(parts[:named]), parts[named:]
            folder = repositories.get(repository)
            if folder is None:
                message = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                self.json({"error": "Repository not found"}, 404, **message)
            elif api and parts[:1] == ["tree"]:
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                self.json(
                    [
                        {
                            "type": "file",
                            "path": str(file.relative_to(folder)),
                            "size": file.stat().st_size,
                            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                        }
                        for file in files
                    ]
                )
            elif api:
                names = [{"rfilename": str(file.relative_to(folder))} for file in folder.rglob("*") if file.is_file()]
                self.json(
                    {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": names, "gated": "manual"}
                )
            elif repository in gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                message = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}
                self.json({"error": "gated"}, 403, **message)
            else:  # resolve/COMMIT/path
                file = folder / "/".join(parts[2:])
                if not file.is_file():
                    self.json({}, 404, **{"X-Error-Code": "EntryNotFound"})
                    return
                body = file.read_bytes()
                etag = f'"{hashlib.sha1(body).hexdigest()}"'
                self.reply(200, body, {"X-Repo-Commit": COMMIT, "ETag": etag, "Accept-Ranges": "bytes"})

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
