"""Runs in Google Cloud Storage."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmft_core import (
    InputError,
    Options,
    Problem,
    Problems,
    RangedReads,
    StorageBackend,
    VerifiedUploads,
    error_chain,
    hookimpl,
    system_words,
)

if TYPE_CHECKING:
    from llmft_plugins.storage.gcs_objects import GcsObjects

llmft_api = 1

CONNECT_TIMEOUT = 10  # seconds
REQUEST_TIMEOUT = 60  # seconds for one request, of at most 50 MB; gcsfs repeats no request that took so long
GOOGLE = "https://storage.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/devstorage.full_control"


class GcsOptions(Options):
    """Options of `--storage gcs`. Credentials come from the ambient chain: GOOGLE_APPLICATION_CREDENTIALS, the login
    of gcloud, the machine's service account."""

    bucket: str = Field("", description="bucket for runs; needed where gcs is the run's storage")
    prefix: str = Field("", description="folder in the bucket under which runs lie")
    project: str = Field("", description="Google Cloud project; default: that of the credentials")
    endpoint_url: str = Field("", description="URL of another server with Google's protocol: an emulator")
    anonymous: bool = Field(False, description="send no credentials: for public buckets and emulators")


class GcsStorage(StorageBackend):
    """Google Cloud Storage over gcsfs."""

    name = "gcs"
    summary = "Google Cloud Storage"
    scheme = "gs"
    options_type = GcsOptions
    creates_exclusively = True

    def filesystem(self) -> Any:
        from aiohttp import ClientTimeout

        from llmft_plugins.storage.gcs_files import GcsFiles

        logger = logging.getLogger("gcsfs")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)  # it prints the traceback of every error that it also raises
        given: GcsOptions = self.options
        token, project = ("anon", "") if given.anonymous else self._credentials()
        return GcsFiles(
            project=given.project or project,
            token=token,
            endpoint_url=given.endpoint_url or None,
            requests_timeout=ClientTimeout(total=REQUEST_TIMEOUT, sock_connect=CONNECT_TIMEOUT),
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def ranged_reads(self) -> RangedReads:
        return self._objects()

    def verified_uploads(self) -> VerifiedUploads:
        return self._objects()

    def _objects(self) -> GcsObjects:
        """A client of its own: gcsfs moves all bytes through one thread, and repeats requests on its own."""
        import requests
        from google.auth.transport.requests import AuthorizedSession

        from llmft_plugins.storage.gcs_client import GcsClient
        from llmft_plugins.storage.gcs_objects import GcsObjects

        given: GcsOptions = self.options
        session = requests.Session() if given.anonymous else AuthorizedSession(self._credentials()[0])
        endpoint = given.endpoint_url or os.environ.get("STORAGE_EMULATOR_HOST") or GOOGLE  # as gcsfs
        return GcsObjects(GcsClient(session, endpoint.rstrip("/")), self.root() if given.bucket else "")

    def _credentials(self) -> tuple[Any, str]:
        """Ambient credentials and their project. Left to itself gcsfs goes on anonymously where it finds none."""
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError

        try:
            credentials, project = google.auth.default(scopes=[SCOPE])
        except DefaultCredentialsError as error:
            raise InputError(
                f"no Google Cloud credentials were found ({' '.join(str(error).split())[:200]}): run `gcloud auth "
                "application-default login`, set GOOGLE_APPLICATION_CREDENTIALS to a key file, or give the machine a "
                "service account; --storage.anonymous is for public buckets and emulators"
            ) from error
        return credentials, project or ""

    def root(self) -> str:
        if not self.options.bucket:
            raise Problems([Problem("storage.bucket", "is required: the GCS bucket in which runs are written")])
        return "/".join([self.options.bucket, *filter(None, self.options.prefix.split("/"))])

    def explain(self, error: BaseException, path: str) -> str:
        names = {base.__name__ for link in error_chain(error) for base in type(link).__mro__}
        codes = {str(getattr(link, "code", "")) for link in error_chain(error)}
        bucket = path.removeprefix("gs://").partition("/")[0]
        where = self.options.endpoint_url or "Google Cloud Storage"
        said = " ".join(str(error).split())[:300]
        if names & {"GoogleAuthError"} or "401" in codes:
            return (
                f"{path}: {where} does not accept the credentials ({said}): check GOOGLE_APPLICATION_CREDENTIALS, or "
                "run `gcloud auth application-default login` again"
            )
        if "403" in codes or "PermissionError" in names:
            return (
                f"{path}: access denied by {where} ({said}): give the account of the credentials the role Storage "
                f"Object User on bucket {bucket}, or use others (GOOGLE_APPLICATION_CREDENTIALS)"
            )
        if "FileNotFoundError" in names or "404" in codes:
            return (
                f"{path}: {where} has no such object, or no bucket {bucket}: check the path, --storage.bucket and that "
                "the bucket was created"
            )
        if "DamagedOnTheWay" in names:
            return f"{path}: {said}: something between this machine and {where} damages data: check the proxy"
        refused = "NewConnectionError" in names  # urllib3's, which is one of its time-outs too
        if not refused and names & {"TimeoutError", "Timeout"}:
            return (
                f"{path}: {where} did not answer in time ({said or 'time-out'}): check the network, the proxy and "
                "--storage.endpoint-url"
            )
        if refused or names & {"ClientConnectionError", "ConnectionError"}:
            why = (refused and system_words(error)) or said
            return f"{path}: cannot reach {where} ({why}): check the network, the proxy and --storage.endpoint-url"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"{path}: the disk of this machine is full: free space"
        if codes & {"429", "500", "502", "503", "504"}:
            return f"{path}: {where} keeps failing ({said}): it is overloaded or broken; try again later"
        return f"{path}: {type(error).__name__}: {said}"


@hookimpl
def llmft_storage_backends() -> list[type[StorageBackend]]:
    return [GcsStorage]
