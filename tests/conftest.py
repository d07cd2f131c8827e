"""Fixtures of all tests, and an environment in which nothing of the developer's machine leaks into them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import Proxy, fault_proxy
from hypothesis import HealthCheck, settings
from servers import GcsServer, S3Server, gcs_emulator, moto, rclone_s3

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
# Variables that would change what a test sees: logins, caches, a cluster, a terminal.
FOREIGN = ("LLMFT_", "AWS_", "GOOGLE_", "WANDB_", "MLFLOW_", "HF_", "HUGGINGFACE_", "RAY_")
FOREIGN += ("FORCE_COLOR", "NO_COLOR", "CLICOLOR", "TTY_", "COLUMNS", "LINES")

_scratch: list[str] = []


def pytest_configure() -> None:
    """Before any test module is imported, because some libraries read the environment at import."""
    # Hypothesis would take a busy machine for a slow function.
    settings.register_profile("llmft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("llmft")
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    _scratch.append(tempfile.mkdtemp(prefix="llmft-tests-"))
    os.environ.update(
        HF_HUB_OFFLINE="1",
        NO_PROXY="127.0.0.1,localhost",
        no_proxy="127.0.0.1,localhost",
        HF_HOME=str(Path(_scratch[0]) / "hf"),  # what a developer has fetched is not there
        RAY_USAGE_STATS_ENABLED="0",
        LLMFT_CACHE=str(Path(_scratch[0]) / "cache"),
        TORCHINDUCTOR_CACHE_DIR=str(Path(_scratch[0]) / "kernels"),
        AWS_EC2_METADATA_DISABLED="true",  # no credentials means none: do not ask a metadata server for 2 s
        NO_GCE_CHECK="true",
        GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",  # else a gcsfs of the tests' own probes the network for a minute
        # an empty home for credentials: a developer's own login must not make a test pass
        AWS_SHARED_CREDENTIALS_FILE=str(Path(_scratch[0]) / "aws-credentials"),
        AWS_CONFIG_FILE=str(Path(_scratch[0]) / "aws-config"),
        CLOUDSDK_CONFIG=str(Path(_scratch[0]) / "gcloud"),
        NETRC=str(Path(_scratch[0]) / "netrc"),
        WANDB_MODE="offline",
        WANDB_ERROR_REPORTING="false",
        WANDB_CACHE_DIR=str(Path(_scratch[0]) / "wandb"),
        MLFLOW_DISABLE_TELEMETRY="true",
    )


def pytest_unconfigure() -> None:
    """The session's scratch folder goes; a folder that cannot be removed is not a test's failure."""
    shutil.rmtree(_scratch.pop(), ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """rclone: checks signatures, keeps files as files."""
    with rclone_s3(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """moto: S3's own semantics, any credentials."""
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    """The GCS emulator, without credentials."""
    with gcs_emulator(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def s3_proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before rclone, with its key in the environment; waits between attempts take no time."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("llmft_core.storage.faults.sleep", lambda seconds: None)
    with fault_proxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def own_name(request: pytest.FixtureRequest) -> str:
    """A name for files in a bucket that are this test's alone."""
    return str(request.node.name).replace("/", "-").replace("[", "-").replace("]", "")


def _shared(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"needs the shared data {path.relative_to(SHARED_DATA.parent)} beside the repository")
    return path


@pytest.fixture(scope="session")
def gsm8k_folder() -> Path:
    """The folder with GSM8K's train.jsonl and test.jsonl."""
    return _shared(SHARED_DATA / "gsm8k")


@pytest.fixture(scope="session")
def llama2_tokenizer_model() -> Path:
    """Llama-2's sentencepiece tokenizer.model."""
    return _shared(SHARED_DATA / "llama2-tokenizer" / "tokenizer.model")
