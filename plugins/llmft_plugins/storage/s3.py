"""Runs in Amazon S3, or in a store that speaks its protocol."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmft_core import (
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
    from llmft_plugins.storage.s3_objects import S3Objects

llmft_api = 1

CONNECT_TIMEOUT = 5  # seconds
READ_TIMEOUT = 20  # seconds without a byte
ATTEMPTS = 2  # of s3fs at one request

_FORBIDDEN = {"403", "AccessDenied", "AllAccessDisabled", "Forbidden"}
_BAD_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthFailure"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"}
_WRONG_REGION = {"301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_FULL = {"507", "InsufficientStorage", "XMinioStorageFull", "QuotaExceeded"}
_BUSY = {"429", "TooManyRequests", "500", "503", "InternalError", "ServiceUnavailable", "SlowDown"}


class S3Options(Options):
    """Options of `--storage s3`. Keys come from the ambient chain: environment, profile, role."""

    bucket: str = Field("", description="bucket for runs; needed where s3 is the run's storage")
    prefix: str = Field("", description="folder in the bucket under which runs lie")
    endpoint_url: str = Field("", description="URL of a store other than AWS; default: AWS_ENDPOINT_URL, else AWS")
    region: str = Field("", description="region of the bucket; default: that of the profile or AWS_DEFAULT_REGION")
    profile: str = Field("", description="profile in ~/.aws to take credentials from; default: AWS_PROFILE")
    anonymous: bool = Field(False, description="send no credentials: for public buckets, which are read-only")


class S3Storage(StorageBackend):
    """S3 over s3fs."""

    name = "s3"
    summary = "Amazon S3, or a store with its protocol (--storage.endpoint-url)"
    scheme = "s3"
    options_type = S3Options
    creates_exclusively = True

    def filesystem(self) -> Any:
        import s3fs

        given: S3Options = self.options
        session = {"profile": given.profile} if given.profile else {}
        filesystem = s3fs.S3FileSystem(
            anon=given.anonymous,
            endpoint_url=given.endpoint_url or None,
            client_kwargs={"region_name": given.region} if given.region else {},
            config_kwargs=self._config(),
            use_listings_cache=False,
            skip_instance_cache=True,
            **session,
        )
        filesystem.retries = ATTEMPTS
        return filesystem

    def _config(self) -> dict[str, Any]:
        # Attempts multiply (botocore's, s3fs's, the core's): botocore makes one and s3fs two, so that a server that is
        # gone is known in seconds, and one that is silent in two READ_TIMEOUTs.
        config: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": READ_TIMEOUT,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        }
        if self._endpoint():
            # Stores other than AWS often know nothing of the newer checksums, or send that of the whole object on a
            # range. For AWS botocore's own defaults stay.
            config |= {
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            }
        return config

    def ranged_reads(self) -> RangedReads:
        return self._objects()

    def verified_uploads(self) -> VerifiedUploads:
        return self._objects()

    def _objects(self) -> S3Objects:
        """A client of its own. The checksum of every part is ours, so the body is not hashed again to sign it."""
        import botocore
        from botocore.config import Config
        from botocore.session import Session

        from llmft_plugins.storage.s3_objects import CONNECTIONS, S3Objects

        given: S3Options = self.options
        config = Config(
            **self._config(),
            max_pool_connections=CONNECTIONS,
            s3={"payload_signing_enabled": False},
            signature_version=botocore.UNSIGNED if given.anonymous else None,
        )
        client = Session(profile=given.profile or None).create_client(
            "s3", region_name=given.region or None, endpoint_url=given.endpoint_url or None, config=config
        )
        return S3Objects(client)

    def _endpoint(self) -> str:
        """URL of a store other than AWS, or nothing. botocore reads the variables itself."""
        variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        return self.options.endpoint_url or next((url for name in variables if (url := os.environ.get(name))), "")

    def root(self) -> str:
        if not self.options.bucket:
            raise Problems([Problem("storage.bucket", "is required: the S3 bucket in which runs are written")])
        return "/".join([self.options.bucket, *filter(None, self.options.prefix.split("/"))])

    def explain(self, error: BaseException, path: str) -> str:
        names = {base.__name__ for link in error_chain(error) for base in type(link).__mro__}
        codes = {code for link in error_chain(error) if (code := _code(link))}
        bucket = path.removeprefix("s3://").partition("/")[0]
        where = self._endpoint() or "AWS"
        said = " ".join(str(error).split())[:300]
        if names & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}:
            return (
                f"{path}: no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a "
                "profile with --storage.profile, or give the machine a role; --storage.anonymous is for public "
                "buckets"
            )
        if "ProfileNotFound" in names:
            return f"{path}: {said}: check --storage.profile, AWS_PROFILE and the files in ~/.aws"
        if codes & _BAD_KEY:
            return (
                f"{path}: {where} does not accept the access key or its secret ({said}): check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or --storage.profile"
            )
        if codes & _EXPIRED:
            return f"{path}: the AWS credentials have expired or the clock is wrong ({said}): log in again"
        if codes & _WRONG_REGION:
            return f"{path}: bucket {bucket} is in another region ({said}): give --storage.region"
        if codes & _FORBIDDEN or "PermissionError" in names:
            return (
                f"{path}: access denied by {where} ({said}): check the credentials (AWS_ACCESS_KEY_ID, "
                f"--storage.profile) and their right to list, read, write and delete in bucket {bucket}"
            )
        if "NoSuchBucket" in codes:
            return (
                f"{path}: {where} has no bucket {bucket}: create it, or check --storage.bucket and "
                "--storage.endpoint-url"
            )
        if "FileNotFoundError" in names:
            return f"{path}: there is no such object in bucket {bucket} of {where}: check the path"
        refused = "EndpointConnectionError" in names  # whose cause, urllib3's error, is one of its time-outs too
        if not refused and names & {"ConnectTimeoutError", "ReadTimeoutError", "TimeoutError"}:
            return (
                f"{path}: {where} did not answer in time ({said or 'time-out'}): check the network, the proxy and "
                "--storage.endpoint-url"
            )
        if refused or names & {"ConnectionError", "HTTPClientError"}:
            why = (refused and system_words(error)) or said
            return (
                f"{path}: cannot reach {where} ({why}): check the network, --storage.endpoint-url and --storage.region"
            )
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"{path}: the disk of this machine is full: free space"
        if codes & _FULL:
            return f"{path}: {where} has no room for it ({said}): free space there, or raise the bucket's quota"
        if codes & _BUSY:
            return f"{path}: {where} keeps failing ({said}): it is overloaded, broken or full; try again later"
        return f"{path}: {type(error).__name__}: {said}"


def _code(error: BaseException) -> str:
    """The store's own error code (`NoSuchBucket`) in an error of botocore."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


@hookimpl
def llmft_storage_backends() -> list[type[StorageBackend]]:
    return [S3Storage]
