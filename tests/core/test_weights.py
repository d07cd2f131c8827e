"""Mirrors and `llmft weights`, on real servers: layouts, manifests, damage, interruption, wrong inputs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache as cache_once
from pathlib import Path

import pytest
from command import llmft
from fault_proxy import Fault, Proxy, fault_proxy
from hub_stub import COMMIT, hub
from servers import GcsServer, S3Server

from llmft_core import InputError
from llmft_core.catalog import Catalog
from llmft_core.cli.main import main
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.storage import faults
from llmft_core.storage.places import Place, Places
from llmft_core.storage.transfer import delete, upload_many, write_bytes
from llmft_core.weights.stage import ModelFolder, stage_model

CATALOG = Catalog(load_plugins())
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MODEL = {"config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS}
HUB_ID = "meta-llama/Llama-2-7b-hf"  # what llama-2-7b stands for
FLAT, CACHED = "meta-llama--Llama-2-7b-hf", "models--meta-llama--Llama-2-7b-hf"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an empty hub cache, for each test."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model as staging sees it (nothing here loads the weights), with things beside it that nobody needs."""
    folder = tmp_path / "source"
    (folder / "original").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
    for name in SHARDS:
        (folder / name).write_bytes(os.urandom(100_000))
    for name in ("pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors", "original/config.json"):
        (folder / name).write_bytes(b"twice")
    return folder


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before rclone; all S3 of a test goes through it. Waits between attempts take no time."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(faults, "sleep", lambda seconds: None)
    with fault_proxy(s3_server.endpoint_url) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def uri(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    """A mirror of this test alone."""
    return f"s3://bucket/{request.node.name.replace('[', '-').replace(']', '')}"


@cache_once
def places_for(endpoint: str) -> Places:
    """Clients of S3 take a while to make: one for each server or proxy."""
    return Places(CATALOG, None, {})


def at(uri: str) -> Place:
    return places_for(os.environ.get("AWS_ENDPOINT_URL", "")).place(uri)


def lay(source: Path, uri: str) -> None:
    """A foreign mirror: every file as it is, no manifest."""
    files, folder = [path for path in source.rglob("*") if path.is_file()], at(uri)
    upload_many([(path, folder / path.relative_to(source).as_posix()) for path in files])


def stage(name: str, mirror: str, *, weights: bool = True) -> ModelFolder:
    plan = RunPlan.model_validate({"model": name, "weights": {"mirror": mirror}})
    places = places_for(os.environ.get("AWS_ENDPOINT_URL", ""))
    return stage_model(plan, CATALOG, places, weights=weights)


def weights(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[str], str]:
    """Exit code, lines of the output, and the error without the progress before it."""
    capsys.readouterr()
    code = main(["weights", *args])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("llmft:")]
    assert len(errors) == (code != 0), "an error is one line"
    return code, said.out.splitlines(), "".join(errors)


def flip(place: Place, content: bytes) -> None:
    """Other bytes, as many."""
    write_bytes(place, content[:-1] + bytes([content[-1] ^ 1]))


def same_files(folder: Path, source: Path) -> bool:
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    return names == MODEL and all((folder / name).read_bytes() == (source / name).read_bytes() for name in MODEL)


# --- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [FLAT, HUB_ID, f"{CACHED}/snapshots/{COMMIT}", "itself/Llama-2-7b-hf"],
    ids=["flat", "tree", "hub", "itself"],
)
def test_a_model_is_found_in_each_layout_and_fetched_once(layout: str, source: Path, uri: str, proxy: Proxy) -> None:
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
    before = len(proxy.heads)
    assert stage("llama-2-7b", mirror).path == whole.path
    again = [head.split(b"\r\n")[0] for head in proxy.heads[before:]]
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


# --- mirrors of ours ----------------------------------------------------------------------------------------------


def test_a_mirror_is_made_listed_verified_and_fetched(
    source: Path, uri: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = weights(capsys, "mirror", str(source), uri, "--as", "llama-2-7b")
    assert (code, out[0]) == (0, f"{uri}/{FLAT}")
    assert out[-1] == f"use it with: --model {HUB_ID} --weights.mirror {uri}"
    code, out, _ = weights(capsys, "list", uri, "--json")
    (row,) = json.loads(out[0] if len(out) == 1 else "\n".join(out))
    assert (row["model"], row["state"], row["files"], row["hashes"]) == (HUB_ID, "complete", 5, "manifest")
    assert weights(capsys, "verify", f"{uri}/{FLAT}")[0] == 0
    puts = proxy.count(b"PUT")
    code, out, _ = weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)
    assert "nothing was uploaded" in out[1]
    assert proxy.count(b"PUT") == puts
    code, out, _ = weights(capsys, "fetch", "llama-2-7b", "--weights.mirror", uri)
    assert code == 0
    assert same_files(Path(out[0]), source)
    assert "every file as the source's manifest says" in out[1]
    assert weights(capsys, "verify", "llama-2-7b")[0] == 0
    gets = proxy.count(b"GET", b".safetensors")
    assert "nothing was fetched" in weights(capsys, "fetch", HUB_ID, "--weights.mirror", uri)[1][1]
    assert proxy.count(b"GET", b".safetensors") == gets
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
    source: Path, uri: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / SHARDS[0]).write_bytes(os.urandom(300_000))  # the longest goes first, alone in front of the crew
    broken = Fault(lambda head: head.startswith(b"PUT ") and b"tokenizer.json" in head, times=1000, status_503=True)
    proxy.faults.append(broken)
    code, _, error = weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)
    assert code == 1
    assert "tokenizer.json" in error
    assert weights(capsys, "list", uri)[1][1].split()[1] == "INCOMPLETE"
    code, _, error = weights(capsys, "fetch", HUB_ID, "--weights.mirror", uri)
    assert code == 2
    assert "is not complete, the copy to it was interrupted" in error
    assert weights(capsys, "verify", f"{uri}/{FLAT}")[0] == 1
    broken.times = 0
    sent = proxy.count(b"PUT", SHARDS[0].encode())
    assert weights(capsys, "mirror", str(source), uri, "--as", HUB_ID)[0] == 0
    assert proxy.count(b"PUT", SHARDS[0].encode()) == sent, "what is there is not sent again"
    assert same_files(stage(HUB_ID, uri).path, source)


def test_what_others_put_there_is_not_overwritten(
    source: Path, uri: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]
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


# --- the cache ----------------------------------------------------------------------------------------------------


def test_a_damaged_file_in_the_cache_alone_is_fetched_again(
    source: Path, uri: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(source, f"{uri}/{FLAT}")
    code, out, _ = weights(capsys, "fetch", HUB_ID, "--weights.mirror", uri)
    assert "no manifest, so SHA-256 were noted as the files came" in out[1]
    folder = Path(out[0])
    right = (source / SHARDS[0]).read_bytes()
    others = proxy.count(b"GET", SHARDS[1].encode())
    for wrong in (right[:1000], b"\0" + right[1:]):
        (folder / SHARDS[0]).write_bytes(wrong)
        assert same_files(stage(HUB_ID, uri).path, source)
    assert proxy.count(b"GET", SHARDS[1].encode()) == others
    os.utime(folder / SHARDS[0])  # touched: read again, found right, not fetched
    gets = proxy.count(b"GET", b".safetensors")
    stage(HUB_ID, uri)
    assert proxy.count(b"GET", b".safetensors") == gets
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


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "no action is given; there are fetch, mirror, list, verify"),
        (("fetsh", "x"), "no action is called fetsh (did you mean fetch?)"),
        (("fetch",), "nothing was given for fetch: write `llmft weights fetch MODEL`"),
        (("mirror", "llama-2-tiny"), "write `llmft weights mirror MODEL MIRROR`"),
        (("verify", "a", "b"), "2 words were given for verify"),
        (("fetch", "llama-2-tiny", "--as", "x/y"), "--as belongs to `llmft weights mirror"),
        (("verify", "x", "--json"), "--json belongs to `llmft weights list"),
        (("list", "--weights.mirror", "m"), "--weights.mirror belongs to `llmft weights fetch MODEL`"),
        (("fetch", "llama-3"), "no model is called llama-3"),
        (("fetch", "./nowhere"), "no such folder"),
        (("mirror", "llama-2-tiny", "m", "--as", "../x"), "'../x' cannot be a model's name in a mirror"),
        (("mirror", "llama-2-tiny", "source"), "is a model's own folder (it has config.json), no mirror"),
        (("list", "nowhere"), "holds no models: give a mirror's root"),
        (("verify", "owner/name"), "neither a folder nor in this node's cache"),
        (("verify", "source"), "has no manifest.json"),
        (("fetch", "llama-2-7b", "--flag"), "--flag"),
    ],
)
def test_wrong_inputs(args: tuple[str, ...], says: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = weights(capsys, *args)
    assert code == 2
    assert says in error


def test_the_mirror_comes_from_a_file_or_the_environment(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert weights(capsys, "mirror", str(source), "m", "--as", "llama-2-7b")[0] == 0
    (tmp_path / "llmft.yaml").write_text("weights: {mirror: m}\nepochs: not for us\n")
    assert "/mirror/meta-llama--" in weights(capsys, "fetch", "llama-2-7b")[1][0]
    monkeypatch.setenv("LLMFT_WEIGHTS_MIRROR", "elsewhere")
    code, _, error = weights(capsys, "fetch", "llama-2-7b")
    assert code == 2
    assert f"is not in the mirror {tmp_path}/elsewhere" in error
    monkeypatch.setenv("LLMFT_WEIGHTS_MIROR", "m")
    assert "did you mean LLMFT_WEIGHTS_MIRROR?" in weights(capsys, "fetch", "llama-2-7b")[2]


def test_help_and_an_empty_cache(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    for action in ("fetch", "mirror", "list", "verify"):
        code, out, _ = weights(capsys, action, "--help")
        assert code == 0
        assert "--backends.s3.endpoint-url" in "\n".join(out)
    code, out, _ = weights(capsys, "list")
    assert (code, out) == (0, [f"{cache} holds no models yet: `llmft weights fetch MODEL`"])
