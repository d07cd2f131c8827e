"""Mirrors with a manifest: made, listed, verified, damaged, interrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command import llmft
from fault_proxy import Fault, Proxy
from hub_stub import hub
from mirrors import FLAT, HUB_ID, SHARDS, at, flip, lay, same_files, stage, weights
from servers import GcsServer

from llmft_core import InputError
from llmft_core.storage.transfer import delete, write_bytes


def test_a_mirror_is_made_listed_verified_and_fetched(
    source: Path, uri: str, s3_proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = weights(capsys, "mirror", str(source), uri, "--as", "llama-2-7b")
    assert (code, out[0]) == (0, f"{uri}/{FLAT}")
    assert out[-1] == f"use it with: --model {HUB_ID} --weights.mirror {uri}"
    code, out, _ = weights(capsys, "list", uri, "--json")
    (row,) = json.loads(out[0] if len(out) == 1 else "\n".join(out))
    assert (row["model"], row["state"], row["files"], row["hashes"]) == (HUB_ID, "complete", 5, "manifest")
    assert weights(capsys, "verify", f"{uri}/{FLAT}")[0] == 0
    puts = s3_proxy.count(b"PUT")
    code, out, _ = weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)
    assert "nothing was uploaded" in out[1]
    assert s3_proxy.count(b"PUT") == puts
    code, out, _ = weights(capsys, "fetch", "llama-2-7b", "--weights.mirror", uri)
    assert code == 0
    assert same_files(Path(out[0]), source)
    assert "every file as the source's manifest says" in out[1]
    assert weights(capsys, "verify", "llama-2-7b")[0] == 0
    gets = s3_proxy.count(b"GET", b".safetensors")
    assert "nothing was fetched" in weights(capsys, "fetch", HUB_ID, "--weights.mirror", uri)[1][1]
    assert s3_proxy.count(b"GET", b".safetensors") == gets
    code, out, _ = weights(capsys, "list")
    assert out[1].startswith(f"{HUB_ID}  complete")
    (source / "tokenizer.json").write_text('{"other": 1}')
    code, _, error = weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)
    assert code == 2
    assert "holds another complete model: remove it first" in error


def test_damage_in_a_mirror_of_ours_is_found(source: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)
    folder = at(f"{uri}/{FLAT}")
    flip(folder / SHARDS[1], (source / SHARDS[1]).read_bytes())
    code, _, error = weights(capsys, "fetch", HUB_ID, "--weights.mirror", uri)
    assert code == 1
    assert f"{folder.uri}/{SHARDS[1]}: 100000 bytes with SHA-256" in error
    assert "were promised" in error
    code, _, error = weights(capsys, "verify", folder.uri)
    assert code == 1
    assert f"is damaged: {SHARDS[1]}: its bytes have changed" in error
    delete(folder / SHARDS[1])
    with pytest.raises(InputError, match=f"{SHARDS[1]} is missing, its manifest lists it"):
        stage(HUB_ID, uri, weights=False)
    assert weights(capsys, "list", uri)[1][1].split()[1] == "INCOMPLETE"
    assert "100.0 kB uploaded" in weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)[1][1]
    assert weights(capsys, "verify", folder.uri)[0] == 0
    write_bytes(folder / "model-00003-of-00003.safetensors", b"smuggled in")
    with pytest.raises(InputError, match=r"model-00003-of-00003\.safetensors is not in the manifest"):
        stage(HUB_ID, uri, weights=False)
    assert weights(capsys, "verify", folder.uri)[0] == 1


def test_an_interrupted_copy_is_no_mirror_and_goes_on(
    source: Path, uri: str, s3_proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / SHARDS[0]).write_bytes(os.urandom(300_000))  # the longest goes first, alone in front of the crew
    broken = Fault(lambda head: head.startswith(b"PUT ") and b"tokenizer.json" in head, times=1000, status_503=True)
    s3_proxy.faults.append(broken)
    code, _, error = weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)
    assert code == 1
    assert "tokenizer.json" in error
    assert weights(capsys, "list", uri)[1][1].split()[1] == "INCOMPLETE"
    code, _, error = weights(capsys, "fetch", HUB_ID, "--weights.mirror", uri)
    assert code == 2
    assert "is not complete, the copy to it was interrupted" in error
    assert weights(capsys, "verify", f"{uri}/{FLAT}")[0] == 1
    broken.times = 0
    sent = s3_proxy.count(b"PUT", SHARDS[0].encode())
    assert weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)[0] == 0
    assert s3_proxy.count(b"PUT", SHARDS[0].encode()) == sent, "what is there is not sent again"
    assert same_files(stage(HUB_ID, uri).path, source)


def test_what_others_put_there_is_not_overwritten(
    source: Path, uri: str, s3_proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(source, f"{uri}/{FLAT}")
    code, _, error = weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)
    assert code == 2
    assert "holds files that no manifest of llmft describes" in error
    assert weights(capsys, "list", uri)[1][1].split()[-2] == "none"
    assert weights(capsys, "verify", f"{uri}/{FLAT}")[0] == 2


def test_google_s_storage_holds_mirrors_too(
    source: Path, gcs_server: GcsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    reach = ["--backends.gcs.endpoint-url", gcs_server.endpoint_url, "--backends.gcs.anonymous"]
    assert weights(capsys, "mirror", str(source), "gs://bucket/mirror", *reach)[0] == 0
    assert weights(capsys, "verify", "gs://bucket/mirror/source", *reach)[0] == 0
    code, out, _ = weights(capsys, "fetch", "gs://bucket/mirror/source", *reach)
    assert code == 0
    assert same_files(Path(out[0]), source)


def test_from_the_hub_to_a_mirror(source: Path, tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "LLMFT_WEIGHTS_MIRROR": "mirror"}
    with hub({"owner/model": source}) as (endpoint, _):
        environment["HF_ENDPOINT"] = endpoint
        answer = llmft("weights", "mirror", "owner/model", "mirror", folder=tmp_path, environment=environment)
    assert answer.code == 0, answer.err
    assert same_files(tmp_path / "mirror" / "owner--model", source)
    answer = llmft("weights", "fetch", "owner/model", folder=tmp_path, environment=environment)
    assert answer.code == 0, answer.err
    assert "/cache/mirror/owner--model-" in answer.out
