"""`llmft doctor`: what on this machine would stop a run, and how to mend it. Each check is a function of its own."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from llmft_core.catalog import Catalog
from llmft_core.checkpoint.staging import kept_copies
from llmft_core.cli.describe import print_table
from llmft_core.cli.plugins import list_rows
from llmft_core.loading import load_plugins
from llmft_core.weights.cache import cache_folder

GPU_TIMEOUT = 120  # seconds; importing torch takes 2 on an idle machine and a minute on a cold network disk
CONNECT_TIMEOUT = 3  # seconds
SPACE_WARNING = 20 * 2**30  # bytes; weights of a 7B model in bf16 are 13 GiB, and one checkpoint as much again
SHARED_MEMORY_WARNING = 2 * 2**30  # bytes; Ray falls back to slow files when its object store does not fit


@dataclass(frozen=True)
class Finding:
    """One line of the report. `mend` is the next action; empty where all is well."""

    state: Literal["ok", "warning", "error"]
    subject: str
    message: str
    mend: str = ""


def add_parser(subparsers: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:  # type: ignore[type-arg]
    """Add `doctor` to the commands."""
    parser = subparsers.add_parser(
        "doctor",
        parents=[common],
        help="check this machine: libraries, GPUs, Ray, disks, credentials, plugins",
        description="Check this machine and say how to mend what is wrong. Exit code 1 if there is an error.",
    )
    parser.set_defaults(command=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Print all findings; 1 where one of them is an error."""
    findings = [finding for check in CHECKS for finding in check()]
    findings += check_plugins(args.disable_plugin or ())
    rows = [(f.state, f.subject, f.message + (f"; to mend: {f.mend}" if f.mend else "")) for f in findings]
    print_table(("STATE", "WHAT", "FINDING"), rows)
    errors = sum(finding.state == "error" for finding in findings)
    warnings = sum(finding.state == "warning" for finding in findings)
    print(f"{errors} errors, {warnings} warnings")
    return 1 if errors else 0


def check_python() -> list[Finding]:
    """The interpreter against what the llmft distribution requires."""
    from packaging.specifiers import SpecifierSet

    version, wanted = platform.python_version(), metadata.metadata("llmft")["Requires-Python"]
    where = f"{version} ({sys.executable})"
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return [Finding("ok", "python", where)]
    return [Finding("error", "python", f"{where}, but llmft needs {wanted}", f"install Python {wanted}")]


def check_libraries() -> list[Finding]:
    """Every library that llmft requires: installed, and in a version that it was made for."""
    from packaging.requirements import Requirement

    findings = []
    for line in metadata.requires("llmft") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            findings.append(Finding("error", requirement.name, "not installed", f"pip install '{wanted}'"))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            findings.append(Finding("ok", requirement.name, version))
        else:
            message = f"{version} is installed, llmft needs {requirement.specifier}"
            findings.append(Finding("error", requirement.name, message, f"pip install '{wanted}'"))
    return findings


_GPU_SCRIPT = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"torch": torch.__version__, "built_for": torch.version.cuda or torch.version.hip, "names": names}))
"""


def check_gpus() -> list[Finding]:
    """What torch sees, asked in a process of its own: a broken driver may take the process down."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _GPU_SCRIPT], capture_output=True, text=True, timeout=GPU_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        message = f"torch did not answer in {GPU_TIMEOUT} s"
        return [Finding("error", "gpus", message, "try `python -c 'import torch; torch.cuda.init()'` and nvidia-smi")]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Finding("error", "gpus", f"torch cannot be used: {last}", "reinstall torch for this machine's driver")]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    if seen["names"]:
        return [Finding("ok", "gpus", f"{len(seen['names'])}: {', '.join(seen['names'])}")]
    if shutil.which("nvidia-smi"):
        message = f"nvidia-smi is here, but torch {seen['torch']} (built for {seen['built_for'] or 'CPU'}) sees no GPU"
        mend = "install a torch built for the driver's CUDA version, and look at CUDA_VISIBLE_DEVICES"
        return [Finding("warning", "gpus", message, mend)]
    return [Finding("ok", "gpus", f"none on this machine (torch {seen['torch']}): training here runs on CPU")]


def check_compiler() -> list[Finding]:
    """What DeepSpeed builds its CPU operators with, and torch.compile its kernels."""
    missing = [tool for tool in ("g++", "ninja") if not shutil.which(tool)]
    if not missing:
        return [Finding("ok", "compiler", "g++ and ninja")]
    message = (
        f"no {' and no '.join(missing)} in PATH: DeepSpeed builds its CPU operators when they are first used "
        "(offload to CPU, and its collectives where there is no GPU), and --compile needs g++ on CPU"
    )
    mend = "apt-get install g++ ninja-build; --strategy ddp does without, and so does zero on GPUs without offload"
    return [Finding("warning", "compiler", message, mend)]


def check_ray() -> list[Finding]:
    """Whether the cluster that RAY_ADDRESS names can be reached."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local", "auto"):
        means = "a run starts Ray on this machine" if address != "auto" else "a run joins the cluster of this machine"
        return [Finding("ok", "ray", f"RAY_ADDRESS is {address or 'not set'}: {means}")]
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or (10001 if parts.scheme == "ray" else None)
    except ValueError:
        host, port = None, None
    if not host or not port:
        mend = "write HOST:PORT, as `ray status` on the head node says it (often port 6379)"
        return [Finding("error", "ray", f"RAY_ADDRESS={address} is not an address", mend)]
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT).close()
    except OSError as error:
        mend = "start the cluster (`ray start --head`), open the port, or unset RAY_ADDRESS to train on this machine"
        return [Finding("error", "ray", f"RAY_ADDRESS={address} does not answer: {error}", mend)]
    return [Finding("ok", "ray", f"RAY_ADDRESS={address} answers")]


def check_disks() -> list[Finding]:
    """Free space where a run writes, and in the shared memory that holds Ray's objects."""
    places = {"working folder": Path.cwd(), "cache": _existing(cache_folder()), "temp": Path(tempfile.gettempdir())}
    findings = []
    for subject, folder in places.items():
        free = shutil.disk_usage(folder).free
        if free < SPACE_WARNING:
            mend = "free some, or move: LLMFT_CACHE for weights, --storage for checkpoints, TMPDIR for the rest"
            message = f"{_size(free)} free in {folder}, less than a 7B model and its checkpoint need"
            findings.append(Finding("warning", f"disk: {subject}", message, mend))
        else:
            findings.append(Finding("ok", f"disk: {subject}", f"{_size(free)} free in {folder}"))
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        enough = free >= SHARED_MEMORY_WARNING
        mend = "" if enough else "give the container more, as with `docker run --shm-size=8g`; Ray is slow without"
        findings.append(Finding("ok" if enough else "warning", "disk: shared memory", f"{_size(free)} free", mend))
    return findings


def check_cache() -> list[Finding]:
    """Whether the cache folder can be written, and how large it is."""
    folder = cache_folder()
    writable = os.access(_existing(folder), os.W_OK | os.X_OK) and _existing(folder).is_dir()
    if not writable:
        mend = "set LLMFT_CACHE to a folder that you may write to"
        return [Finding("error", "cache", f"{folder} cannot be written", mend)]
    kept = kept_copies(cache_folder())
    if kept:
        mend = "`llmft checkpoint push FOLDER URI` uploads one (or remove them): a run that goes on may own the newest"
        message = f"{len(kept)} checkpoints that were written and not uploaded: {', '.join(map(str, kept))}"
        return [Finding("warning", "cache", message, mend)]
    held = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return [Finding("ok", "cache", f"{folder} holds {_size(held)}" if folder.exists() else f"{folder} will be made")]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _size(count: int) -> str:
    """Bytes in binary units: `1.5 GiB`."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def check_credentials() -> list[Finding]:
    """Which of the ambient chains of S3, GCS and the hub have something to offer. Never what it is."""
    home = Path.home()
    aws_file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws/credentials")
    gcloud = Path(os.environ.get("CLOUDSDK_CONFIG") or home / ".config/gcloud")
    hub_home = Path(os.environ.get("HF_HOME") or home / ".cache/huggingface")
    chains: dict[str, dict[str, bool]] = {
        "s3": {
            "AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID" in os.environ and "AWS_SECRET_ACCESS_KEY" in os.environ,
            "AWS_PROFILE": "AWS_PROFILE" in os.environ,
            "AWS_WEB_IDENTITY_TOKEN_FILE": "AWS_WEB_IDENTITY_TOKEN_FILE" in os.environ,
            "a container's role": any(name.startswith("AWS_CONTAINER_CREDENTIALS_") for name in os.environ),
            str(aws_file): aws_file.is_file(),
            str(home / ".aws/config"): (home / ".aws/config").is_file(),
        },
        "gcs": {
            "GOOGLE_APPLICATION_CREDENTIALS": "GOOGLE_APPLICATION_CREDENTIALS" in os.environ,
            "gcloud's application default": (gcloud / "application_default_credentials.json").is_file(),
        },
        "hub": {
            "HF_TOKEN": "HF_TOKEN" in os.environ,
            "the token of `hf auth login`": Path(os.environ.get("HF_TOKEN_PATH") or hub_home / "token").is_file(),
        },
    }
    needed = {
        "s3": "needed for s3:// unless the bucket is public or the machine has a role",
        "gcs": "needed for gs:// unless the bucket is public or the machine has a service account",
        "hub": "needed for gated models such as Llama-2",
    }
    findings = []
    for store, chain in chains.items():
        present = [source for source, there in chain.items() if there]
        message = f"found in {', '.join(present)}" if present else f"none found; {needed[store]}"
        findings.append(Finding("ok", f"credentials: {store}", message))
    for variable in ("GOOGLE_APPLICATION_CREDENTIALS", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        if variable in os.environ and not Path(os.environ[variable]).is_file():
            message = f"{variable} names a file that is not there: {os.environ[variable]}"
            findings.append(Finding("error", "credentials", message, "correct the path, or unset the variable"))
    return findings


def check_plugins(disabled: Sequence[str]) -> list[Finding]:
    """Plugins that could not be loaded are warnings: they matter only to a run that chooses them."""
    catalog = Catalog(load_plugins(disabled))
    findings = []
    for kind, name, distribution, version, state in list_rows(catalog):
        mend = "" if "disable one with" in state else f"mend or update it, or --disable-plugin {distribution}:{name}"
        if state not in ("loaded", "disabled"):
            subject = f"plugin {name}" if kind == "-" else f"{kind} {name}"
            findings.append(Finding("warning", subject, f"{distribution} {version}: {state}", mend))
    total = len({entry.plugin_id for entry in catalog.entries})
    return findings or [Finding("ok", "plugins", f"{total} loaded")]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_python,
    check_libraries,
    check_gpus,
    check_compiler,
    check_ray,
    check_disks,
    check_cache,
    check_credentials,
)
