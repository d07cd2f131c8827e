"""What becomes of a store's errors: repeated when they may pass, else one line that a user can act on."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, TypeVar

from llmft_core.errors import InputError, LlmftError, error_chain
from llmft_core.storage.places import Place

T = TypeVar("T")

# The clients of S3 (botocore), GCS (aiohttp, requests) and others raise their own types, and the core imports none of
# them: a passing fault is recognised by the names of an error's base classes, by an HTTP status or by its errno.
_TRANSIENT_TYPES = {
    "botocore.exceptions": {"HTTPClientError", "ConnectionError"},
    "aiohttp.client_exceptions": {"ClientConnectionError", "ClientPayloadError"},
    "requests.exceptions": {"ConnectionError", "Timeout", "ChunkedEncodingError"},
    "builtins": {"ConnectionError", "TimeoutError"},
}
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
# s3fs turns 503 into EBUSY and 500 into EREMOTEIO.
_TRANSIENT_ERRNO = {errno.EBUSY, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE}

_USERS_TYPES = {
    "FileNotFoundError",
    "PermissionError",
    "NotADirectoryError",
    "IsADirectoryError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "GoogleAuthError",
}
_USERS_STATUS = range(400, 500)


@dataclass(frozen=True)
class Patience:
    """How long to keep trying: so many attempts, waits that double from `first_wait` to `longest_wait` (seconds, ±50 %
    so that many workers do not return at once) and are longer where the store asks for it (Retry-After), no new attempt
    once `deadline` seconds have passed, and no answer after `limit` seconds is a fault too."""

    attempts: int = 7  # a store that is busy for 8 s is outlived with any jitter
    first_wait: float = 0.5
    deadline: float = 30.0
    limit: float = 60.0
    longest_wait: float = 8.0


STANDARD = Patience()


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment. Never for what is missing, forbidden or full."""
    if users_fault(error) or any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in error_chain(error)):
        return False
    for link in error_chain(error):
        for base in type(link).__mro__:
            if base.__name__ in _TRANSIENT_TYPES.get(base.__module__, ()):
                return True
        if _status(link) in _TRANSIENT_STATUS or (isinstance(link, OSError) and link.errno in _TRANSIENT_ERRNO):
            return True
    return False


def users_fault(error: BaseException) -> bool:
    """Whether the user has to change something: a name, a key, a permission."""
    if {base.__name__ for base in type(error).__mro__} & _USERS_TYPES:
        return True
    status = _status(error)
    return status in _USERS_STATUS and status not in _TRANSIENT_STATUS


def refused(error: BaseException) -> bool:
    """Whether the store understood the request and does not permit it."""
    return any(isinstance(link, PermissionError) or _status(link) in (401, 403) for link in error_chain(error))


def asked_wait(error: BaseException) -> float:
    """Seconds that the store itself asks to wait (Retry-After); 0 where it does not say, or gives a date."""
    for link in error_chain(error):
        response = getattr(link, "response", None)
        headers = _metadata(link).get("HTTPHeaders") or getattr(response, "headers", None)
        headers = headers or getattr(link, "headers", None)  # botocore; requests; aiohttp
        if isinstance(headers, Mapping):
            told = {str(name).lower(): str(value).strip() for name, value in headers.items()}.get("retry-after", "")
            if told.isdecimal():
                return float(told)
    return 0.0


def _metadata(error: BaseException) -> Mapping[str, Any]:
    """What botocore keeps of an answer."""
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, requests, gcsfs or botocore, where there is one."""
    metadata = _metadata(error)
    found = (getattr(error, "code", None), getattr(error, "status", None), metadata.get("HTTPStatusCode"))
    return next((int(str(status)) for status in found if str(status).isdigit()), None)


def attempt(
    place: Place, action: Callable[[], T], patience: Patience = STANDARD, stopped: Callable[[], bool] = lambda: False
) -> T:
    """Runs `action` on a store, again when its error may pass, unless `stopped` by then. Raises LlmftError, InputError
    where the user has to change something, with the backend's explanation in one line."""
    started = monotonic()
    for turn in range(patience.attempts):
        try:
            return _within(patience.limit, action)
        except LlmftError:
            raise
        except Exception as error:  # a store's client may raise anything; it is explained, not swallowed
            wait = min(patience.first_wait * 2**turn, patience.longest_wait) * random.uniform(0.5, 1.5)
            wait = max(wait, asked_wait(error))
            in_time = monotonic() - started + wait < patience.deadline
            if turn + 1 < patience.attempts and in_time and transient(error) and _waited(wait, stopped):
                continue
            raise explained(place, error) from error
    raise AssertionError("patience has at least one attempt")


def _waited(seconds: float, stopped: Callable[[], bool]) -> bool:
    """Whether the wait came to its end: what is waited for may be given up meanwhile."""
    slices = max(1, round(seconds / 0.25))
    for _ in range(slices):
        if stopped():
            return False
        sleep(seconds / slices)
    return not stopped()


def _within(limit: float, action: Callable[[], T]) -> T:
    """The action's result, or TimeoutError after `limit` seconds.

    The clients' own time-outs have holes: none of them counts while aiohttp waits for `100 Continue` or for a peer that
    does not read. The thread is left behind then; it ends with the process.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(action())
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread, whatever it is
            answer.set_exception(error)

    threading.Thread(target=work, name="llmft-storage", daemon=True).start()
    try:
        return answer.result(timeout=limit)
    except TimeoutError:
        if answer.done():
            raise
        raise TimeoutError(f"no answer within {limit:g} s") from None


def explained(place: Place, error: Exception) -> LlmftError:
    """The error in the backend's words, as one line."""
    line = " ".join(place.backend.explain(error, place.uri).split()).replace("--storage.", f"--{place.backend.flags}.")
    return InputError(line) if users_fault(error) else LlmftError(line)
