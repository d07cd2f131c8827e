"""What tests of both stores' protocols share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_proxy import fault_proxy
from servers import GcsServer, S3Server
from stores import Store


@pytest.fixture(params=["s3", "gcs"])
def store(request: pytest.FixtureRequest, own_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    options = {"bucket": "bucket", "prefix": own_name}
    if request.param == "gcs":
        google: GcsServer = request.getfixturevalue("gcs_server")
        with fault_proxy(google.endpoint_url) as proxy:
            yield Store("gcs", proxy, {**options, "endpoint-url": proxy.url, "anonymous": True})
        return
    amazon: S3Server = request.getfixturevalue("s3_server")
    for name, value in amazon.environment.items():
        monkeypatch.setenv(name, value)
    with fault_proxy(amazon.endpoint_url) as proxy:
        yield Store("s3", proxy, {**options, "endpoint-url": proxy.url})
