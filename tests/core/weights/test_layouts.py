"""The layouts that a mirror may have, and what leads out of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fault_proxy import Proxy
from hub_stub import COMMIT
from mirrors import CACHED, FLAT, HUB_ID, SHARDS, at, flip, lay, same_files, stage
from servers import S3Server

from llmft_core import InputError
from llmft_core.cli.main import main
from llmft_core.storage.transfer import write_bytes


@pytest.mark.parametrize(
    "layout",
    [FLAT, HUB_ID, f"{CACHED}/snapshots/{COMMIT}", "itself/Llama-2-7b-hf"],
    ids=["flat", "tree", "hub", "itself"],
)
def test_a_model_is_found_in_each_layout_and_fetched_once(layout: str, source: Path, uri: str, s3_proxy: Proxy) -> None:
    lay(source, f"{uri}/{layout}")
    write_bytes(at(f"{uri}/{CACHED}-other/refs/main"), b"no model")
    if layout.startswith(CACHED):
        write_bytes(at(f"{uri}/{CACHED}/refs/main"), f"{COMMIT}\n".encode())
        lay(source, f"{uri}/{CACHED}/snapshots/{'f' * 40}")  # an older commit
    mirror = f"{uri}/{layout}" if layout.startswith("itself") else uri
    small = stage("llama-2-7b", mirror, weights=False)
    whole = stage(HUB_ID, mirror)
    assert same_files(whole.path, source)
    assert small.digest == whole.digest
    before = len(s3_proxy.heads)
    assert stage("llama-2-7b", mirror).path == whole.path
    again = [head.split(b"\r\n")[0] for head in s3_proxy.heads[before:]]
    read = [line for line in again if line.startswith(b"GET") and b"?" not in line]  # with one it is a listing
    assert again
    assert [line for line in read if b"refs/main" not in line] == []
    flip(at(f"{mirror}/{SHARDS[0]}" if mirror != uri else f"{uri}/{layout}/{SHARDS[0]}"), b"x" * 100_000)
    assert stage("llama-2-7b", mirror).digest != whole.digest, "what was overwritten is seen, though as large as before"
    if layout.startswith(CACHED):
        whole = stage("llama-2-7b", mirror)
        by_uri = stage(f"{uri}/{CACHED}", "")
        assert by_uri.path == whole.path


def test_a_model_that_the_mirror_lacks_is_found_in_preflight(
    source: Path, uri: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lay(source, f"{uri}/other--model")
    assert main(["plan", "--model", "llama-2-7b", "--weights.mirror", uri, "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert f"model: model llama-2-7b ({HUB_ID}) is not in the mirror {uri}: looked for {FLAT}/, {HUB_ID}/ and" in error
    assert "found other--model/; put it there with `llmft weights mirror llama-2-7b" in error
    with pytest.raises(InputError, match=r"a model's own folder: give --model .*other--model"):
        stage("llama-2-7b", f"{uri}/other--model")
    with pytest.raises(InputError, match="has no bucket nowhere"):
        stage("llama-2-7b", "s3://nowhere/mirror")
    with pytest.raises(InputError, match=r"^weights\.mirror: .*nosuch://"):
        stage("llama-2-7b", "nosuch://nowhere/mirror")


def test_a_mirror_in_a_folder_is_named_absolutely_for_the_nodes(tmp_path: Path) -> None:
    from llmft_core.placing import absolute_mirror
    from llmft_core.plan import WeightsOptions

    assert absolute_mirror(WeightsOptions(mirror="m")).mirror == str(tmp_path / "m")
    for as_it_is in ("", "s3://bucket/m"):
        assert absolute_mirror(WeightsOptions(mirror=as_it_is)).mirror == as_it_is


def test_what_leads_out_of_the_mirror_is_refused(source: Path, uri: str) -> None:
    write_bytes(at(f"{uri}/{CACHED}/refs/main"), b"../../elsewhere")
    with pytest.raises(InputError, match=r"refs/main holds '\.\./\.\./elsewhere', which is no commit"):
        stage("llama-2-7b", uri)
    write_bytes(at(f"{uri}/{CACHED}/refs/main"), b"a" * 40)
    with pytest.raises(InputError, match=r"names the commit a+, but .* has no config\.json"):
        stage("llama-2-7b", uri)
    lay(source, f"{uri}/{FLAT}")
    described = {"files": {"../../config.json": {"bytes": 1, "sha256": "0" * 64}}}
    write_bytes(at(f"{uri}/{FLAT}/manifest.json"), json.dumps(described).encode())
    with pytest.raises(InputError, match=r"'\.\./\.\./config\.json' is not a relative path"):
        stage("llama-2-7b", uri)


def test_an_object_whose_key_leads_out_of_the_mirror_is_refused(
    source: Path, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_server.endpoint_url)
    lay(source, f"s3://bucket/keys/{FLAT}")
    boto3.client("s3").put_object(Bucket="bucket", Key=f"keys/{FLAT}/../../evil.safetensors", Body=b"x")
    with pytest.raises(InputError, match=r"evil\.safetensors' is not a relative path"):
        stage("llama-2-7b", "s3://bucket/keys")
