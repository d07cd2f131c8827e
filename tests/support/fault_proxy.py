"""A TCP proxy between an HTTP client and a real server, which breaks what it is told to break and counts the rest.

It knows of HTTP only where a request and an answer begin: enough to break the n-th answer, and to count bytes.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def refusal(status: str, code: str = "", *headers: str) -> bytes:
    """A whole answer in a server's place: `403 Forbidden`, S3's error code, more header lines."""
    body = f"<Error><Code>{code}</Code><Message>{code} by the proxy</Message></Error>" if code else ""
    return _whole(status, body, "Content-Type: application/xml", *headers)


def google_refusal(status: str, said: str, *headers: str) -> bytes:
    """The same as Google says it."""
    body = json.dumps({"error": {"code": int(status.split()[0]), "message": said}})
    return _whole(status, body, "Content-Type: application/json", *headers)


def _whole(status: str, body: str, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "Connection: close", "", ""]
    return ("\r\n".join(lines) + body).encode()


@dataclass
class Fault:
    """What happens to the requests that `of` accepts, `times` times. One of `status_503`, `answer`, `hang`,
    `lose_answer`, `reset_after`, `truncate_after`, `flip_answer`, `flip_request` (the last four: bytes of the body)."""

    of: Callable[[bytes], bool]
    """Given the request's head, from the method to the empty line."""
    times: int = 1
    status_503: bool = False
    answer: bytes | None = None
    """Given by the proxy in the server's place (see `refusal`, `google_refusal`)."""
    hang: bool = False
    reset_after: int | None = None
    truncate_after: int | None = None
    lose_answer: bool = False
    """The server gets and answers the request, the client sees only the end of the connection."""
    flip_answer: int | None = None
    flip_request: int | None = None


@dataclass
class Proxy:
    """What a test sees of it."""

    url: str
    faults: list[Fault] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    """The head of each request, in their order."""
    answered: int = 0
    """Bytes of the server's answers that went to clients."""
    rate: float | None = None
    """Bytes/s of all answers together, where they are to be slow."""
    upload_rate: float | None = None
    """Bytes/s of all requests together."""
    before_answer: Callable[[bytes], None] | None = None
    """Called with a request's head before it goes to the server."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, method: bytes, part: bytes = b"") -> int:
        """Requests with this method, and this in their first line."""
        first = [head.split(b"\r\n", 1)[0] for head in self.heads]
        return sum(line.startswith(method + b" ") and part in line for line in first)

    def fault_for(self, head: bytes) -> Fault | None:
        """The fault of a new request, used up by one."""
        with self.lock:
            self.heads.append(head)
            for fault in self.faults:
                if fault.times > 0 and fault.of(head):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def fault_proxy(upstream: str) -> Iterator[Proxy]:
    """Runs the proxy to `http://HOST:PORT` until the block ends."""
    host, port = upstream.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    proxy = Proxy(f"http://127.0.0.1:{listener.getsockname()[1]}")
    closing = threading.Event()
    open_sockets: set[socket.socket] = set()

    def accept() -> None:
        while not closing.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            open_sockets.add(client)
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    def serve(client: socket.socket) -> None:
        with suppress(OSError), ExitStack() as opened:
            opened.enter_context(client)
            server: socket.socket | None = None
            received = b""
            while True:
                while b"\r\n\r\n" not in received:
                    block = client.recv(65536)
                    if not block:
                        return
                    received += block
                head, _, received = received.partition(b"\r\n\r\n")
                fault = proxy.fault_for(head)
                if fault is not None and fault.hang:
                    closing.wait()
                    return
                refused = None if fault is None else REFUSAL if fault.status_503 else fault.answer
                if refused is not None:
                    client.sendall(refused)
                    client.shutdown(socket.SHUT_WR)
                    client.settimeout(1)
                    while client.recv(65536):  # a client that still sends would see a reset instead of the answer
                        pass
                    return
                if proxy.before_answer is not None:
                    proxy.before_answer(head)
                if server is None:  # not before: the emulator of Google serves one connection at a time, idle ones too
                    server = opened.enter_context(socket.create_connection((host, int(port))))
                    open_sockets.add(server)
                received = exchange(client, server, head, received, fault)

    def exchange(
        client: socket.socket, server: socket.socket, head: bytes, received: bytes, fault: Fault | None
    ) -> bytes:
        """One request and its answer; returns what the client has sent of the next one."""
        wants_continue = b"100-continue" in head.lower()
        server.sendall(head.replace(b"Expect: 100-continue\r\n", b"") + b"\r\n\r\n")
        if wants_continue:
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        left, position = _length(head), 0
        while left > 0:
            block = received[:left] or client.recv(min(left, 65536))
            if not block:
                raise ConnectionResetError
            received = received[len(block) :] if received else b""
            server.sendall(_flipped(block, position, fault.flip_request if fault else None))
            left, position = left - len(block), position + len(block)
            with proxy.lock:
                if proxy.upload_rate is not None:
                    time.sleep(len(block) / proxy.upload_rate)
        answer = b""
        while b"\r\n\r\n" not in answer:
            block = server.recv(65536)
            if not block:
                raise ConnectionResetError
            answer += block
        if fault is not None and fault.lose_answer:
            raise ConnectionResetError
        answer_head, _, body = answer.partition(b"\r\n\r\n")
        client.sendall(answer_head + b"\r\n\r\n")
        if head.startswith(b"HEAD "):
            return received
        left, position = _length(answer_head), 0
        if b"chunked" in answer_head.lower():  # listings and errors: to the end of the last chunk
            while not body.endswith(b"0\r\n\r\n"):
                body += server.recv(65536)
            client.sendall(body)
            return received
        while left > 0:
            block = body or server.recv(min(left, 65536))
            body = b""
            if not block:
                raise ConnectionResetError
            for end, reset in ((fault.reset_after, True), (fault.truncate_after, False)) if fault else ():
                if end is not None and position + len(block) > end:
                    client.sendall(block[: end - position])
                    if reset:  # RST instead of FIN
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    raise ConnectionResetError
            client.sendall(_flipped(block, position, fault.flip_answer if fault else None))
            with proxy.lock:
                proxy.answered += len(block)
            with proxy.lock:
                if proxy.rate is not None:
                    time.sleep(len(block) / proxy.rate)
            left, position = left - len(block), position + len(block)
        return received

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        closing.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        listener.close()
        thread.join(timeout=5)
        for each in list(open_sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _flipped(block: bytes, position: int, at: int | None) -> bytes:
    if at is None or not position <= at < position + len(block):
        return block
    spoilt = bytearray(block)
    spoilt[at - position] ^= 1
    return bytes(spoilt)
