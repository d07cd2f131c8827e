"""A node's cache, and the hub's, against damage."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from fault_proxy import Proxy
from hub_stub import COMMIT
from mirrors import FLAT, HUB_ID, MODEL, SHARDS, lay, same_files, stage, weights


def test_a_damaged_file_in_the_cache_alone_is_fetched_again(
    source: Path, uri: str, s3_proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(source, f"{uri}/{FLAT}")
    code, out, _ = weights(capsys, "fetch", HUB_ID, "--weights.mirror", uri)
    assert "no manifest, so SHA-256 were noted as the files came" in out[1]
    folder = Path(out[0])
    right = (source / SHARDS[0]).read_bytes()
    others = s3_proxy.count(b"GET", SHARDS[1].encode())
    for wrong in (right[:1000], b"\0" + right[1:]):
        (folder / SHARDS[0]).write_bytes(wrong)
        assert same_files(stage(HUB_ID, uri).path, source)
    assert s3_proxy.count(b"GET", SHARDS[1].encode()) == others
    os.utime(folder / SHARDS[0])  # touched: read again, found right, not fetched
    gets = s3_proxy.count(b"GET", b".safetensors")
    stage(HUB_ID, uri)
    assert s3_proxy.count(b"GET", b".safetensors") == gets
    times = (folder / SHARDS[0]).stat()
    (folder / SHARDS[0]).write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    os.utime(folder / SHARDS[0], ns=(times.st_atime_ns, times.st_mtime_ns))  # as a bad disk would
    code, _, error = weights(capsys, "verify", "llama-2-7b")
    assert code == 1
    assert f"{SHARDS[0]}: its bytes have changed" in error
    assert "remove this folder and fetch the model again" in error


def test_the_hub_s_cache_is_verified_by_its_own_names(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = tmp_path / "hf" / "models--owner--name"
    snapshot = cached / "snapshots" / COMMIT
    for folder in (snapshot, cached / "refs", cached / "blobs"):
        folder.mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    for name in MODEL:
        content = (source / name).read_bytes()
        blob = cached / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    assert weights(capsys, "list")[1][1].startswith("owner/name  complete")
    assert weights(capsys, "verify", "owner/name")[0] == 0
    (snapshot / SHARDS[0]).write_bytes(os.urandom(100_000))
    code, _, error = weights(capsys, "verify", "owner/name")
    assert code == 1
    assert SHARDS[0] in error
    code, _, error = weights(capsys, "mirror", str(snapshot), "mirror")
    assert code == 1
    assert "its bytes are not those that were fetched" in error
    assert not list(Path("mirror").rglob("*"))
