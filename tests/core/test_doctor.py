"""`llmft doctor`: each check finds what is wrong, says how to mend it, and shows no secret."""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from llmft_core.cli import doctor

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def llmft(*argv: str) -> int:
    """The command as main.py wires it."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--disable-plugin", action="append", default=[])
    parser = argparse.ArgumentParser("llmft")
    doctor.add_parser(parser.add_subparsers(), common)
    args = parser.parse_args(argv)
    return int(args.command(args))


def test_libraries_are_held_against_what_llmft_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["pluggy>=1.5", "pydantic<2", "no-such-library>=3", 'pytest>=999; extra == "tests"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    fine, old, missing = doctor.check_libraries()
    assert fine.state == "ok"
    assert (old.state, old.subject, old.mend) == ("error", "pydantic", "pip install 'pydantic<2'")
    assert (missing.state, missing.message, missing.mend) == (
        "error",
        "not installed",
        "pip install 'no-such-library>=3'",
    )


def test_this_environment_has_what_llmft_requires() -> None:
    assert [finding for finding in doctor.check_libraries() if finding.state != "ok"] == []
    assert [finding.state for finding in doctor.check_python()] == ["ok"]


def test_a_torch_that_dies_is_an_error_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_GPU_SCRIPT", "import sys; sys.exit('libcuda.so: version mismatch')")
    (finding,) = doctor.check_gpus()
    assert finding.state == "error"
    assert "libcuda.so: version mismatch" in finding.message


def test_a_torch_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_GPU_SCRIPT", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "GPU_TIMEOUT", 0.5)
    (finding,) = doctor.check_gpus()
    assert (finding.state, finding.message) == ("error", "torch did not answer in 0.5 s")


def test_gpus_that_torch_cannot_see_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    found = '{"torch": "2.8+cpu", "built_for": null, "names": []}'
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, found + "\n", ""))
    monkeypatch.setattr(shutil, "which", lambda tool: f"/bin/{tool}")
    (finding,) = doctor.check_gpus()
    assert finding.state == "warning"
    assert "built for CPU" in finding.message
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert doctor.check_gpus()[0].state == "ok"


def test_a_missing_compiler_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "g++" else tool)
    (finding,) = doctor.check_compiler()
    assert finding.state == "warning"
    assert "no g++ in PATH" in finding.message
    assert "DeepSpeed" in finding.message
    assert "ddp" in finding.mend


def test_ray_at_an_address_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            assert doctor.check_ray()[0].state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    (finding,) = doctor.check_ray()
    assert finding.state == "error"
    assert "does not answer" in finding.message
    assert "unset RAY_ADDRESS" in finding.mend


@pytest.mark.parametrize("address", ["head", "head:port", "ray://", "10.0.0.1:99999"])
def test_what_is_no_address_is_an_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    (finding,) = doctor.check_ray()
    assert finding.state == "error"
    assert "is not an address" in finding.message


def test_a_full_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 10**12, 2**30))
    findings = doctor.check_disks()
    assert {finding.state for finding in findings} == {"warning"}
    assert all(finding.mend for finding in findings)
    assert "1.0 GiB free" in findings[0].message


def test_the_cache_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    assert doctor.check_cache()[0].message.endswith("cache will be made")
    (tmp_path / "cache" / "deep").mkdir(parents=True)
    (tmp_path / "cache" / "deep" / "file").write_bytes(bytes(3 * 2**20))
    assert doctor.check_cache()[0].message.endswith("holds 3 MiB")


def test_a_cache_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "file" / "cache"))
    (finding,) = doctor.check_cache()
    assert (finding.state, finding.mend) == ("error", "set LLMFT_CACHE to a folder that you may write to")


def test_credentials_are_found_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for variable in ("HF_TOKEN_PATH", "HF_HOME", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(variable, "top-secret-value")
    findings = {finding.subject: finding for finding in doctor.check_credentials()}
    assert findings["credentials: s3"].message.startswith("found in AWS_ACCESS_KEY_ID")
    assert findings["credentials: hub"].message.startswith("found in HF_TOKEN")
    assert findings["credentials: gcs"].message.startswith("none found; needed for gs://")
    assert "top-secret-value" not in str(findings)


def test_credentials_that_point_nowhere_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gone.json"))
    (finding,) = [finding for finding in doctor.check_credentials() if finding.state == "error"]
    assert "GOOGLE_APPLICATION_CREDENTIALS names a file that is not there" in finding.message


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warning", 0), ("error", 1)])
def test_only_errors_make_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, code: int
) -> None:
    finding = doctor.Finding(state, "something", "is as it is", "do this")  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [finding],))
    assert llmft("doctor") == code
    out = capsys.readouterr().out
    assert f"{state} " in out
    assert "something" in out
    assert "is as it is; to mend: do this" in out
