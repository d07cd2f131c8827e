"""Who moves files to and from S3 in `storage.py`: each makes a client and gives (download, upload)."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
