"""A real Ray cluster of three nodes on this machine, each with a cache of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import Answer, llmft, llmft_path
from fault_proxy import Fault, Proxy, fault_proxy
from servers import S3Server

TINY = ("--dataset.rows", "32", "--dataset.test-rows", "8", "--global-batch", "16", "--max-steps", "2")


@dataclass(frozen=True)
class ThreeNodes:
    address: str
    caches: tuple[Path, ...]
    environment: dict[str, str]
    """With which the driver, as the nodes, reaches the S3 server."""
    cluster: Any
    nodes: tuple[Any, ...]

    def run(self, *flags: str, folder: Path) -> Answer:
        return llmft("run", "--cluster", self.address, *TINY, *flags, folder=folder, environment=self.environment)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[ThreeNodes]:
    """A head without room for workers and two nodes with one core each; the second lacks the DeepSpeed strategies."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # before ray is imported: it stays on loopback
    from ray.cluster_utils import Cluster

    caches = tuple(tmp_path_factory.mktemp(f"node{number}") for number in range(2))
    loopback = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **loopback})
    nodes = []
    try:
        for cache, disabled in zip(caches, ("", "zero"), strict=True):
            variables = {"LLMFT_CACHE": str(cache), "LLMFT_DISABLED_PLUGINS": disabled, **s3_server.environment}
            nodes.append(started.add_node(num_cpus=1, node_ip_address="127.0.0.1", env_vars=variables))
        started.wait_for_nodes()
        yield ThreeNodes(started.address, caches, s3_server.environment, started, tuple(nodes))
    finally:
        started.shutdown()
        monkeypatch.undo()


def test_each_node_gets_weights_data_and_a_worker(cluster: ThreeNodes, tmp_path: Path) -> None:
    answer = cluster.run("--workers", "2", "--name", "three", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert "SPEND A REAL CLUSTER" in answer.out
    for cache in cluster.caches:
        assert list((cache / "built").glob("*/model.safetensors"))
        assert list((cache / "data").glob("*/train/ids.npy"))
        assert not list(cache.rglob("*.partial"))
    run = tmp_path / "llmft-runs" / "runs" / "three"
    assert (run / "checkpoint_00000" / ".is_checkpoint").is_file()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert not list(run.parent.glob(".llmft-*"))  # neither a probe nor the flag of the shared folder stays behind


def test_a_node_that_lacks_a_plugin_is_named_before_training(cluster: ThreeNodes, tmp_path: Path) -> None:
    answer = cluster.run("--workers", "2", "--strategy", "zero-2", "--name", "lacking", folder=tmp_path)
    assert answer.code == 2, answer.out
    (line,) = answer.errors
    assert "(127.0.0.1)" in line
    assert "no strategy is called zero-2" in line
    assert "plugin llmft:zero is disabled" in line
    assert not (tmp_path / "llmft-runs" / "runs" / "lacking").exists()


def test_a_node_without_the_folder_for_nvme_is_named_before_training(cluster: ThreeNodes, tmp_path: Path) -> None:
    """Ray believes that this node has a GPU, and nothing gets so far as to look for it."""
    variables = {"LLMFT_CACHE": str(cluster.caches[0]), **cluster.environment}
    node = cluster.cluster.add_node(num_cpus=1, num_gpus=1, node_ip_address="127.0.0.1", env_vars=variables)
    try:
        absent = tmp_path / "absent"
        flags = ("--strategy.offload-params", "nvme", "--strategy.nvme-path", str(absent), "--state.every-minutes", "0")
        answer = cluster.run("--workers", "1", "--strategy", "zero-3", *flags, "--name", "nvme", folder=tmp_path)
    finally:
        cluster.cluster.remove_node(node)
    assert answer.code == 2, answer.out
    lacks = f"(127.0.0.1): strategy.nvme-path: {absent} is no folder that this machine can write to: "
    assert len([line for line in answer.errors if lacks in line]) == 2, "the other node lacks the whole strategy"
    assert not (tmp_path / "llmft-runs" / "runs" / "nvme").exists()


def test_more_workers_than_the_cluster_has_are_refused(cluster: ThreeNodes, tmp_path: Path) -> None:
    answer = cluster.run("--workers", "4", folder=tmp_path)
    assert answer.code == 2, answer.out
    assert "workers: 4 workers need 4 cores" in answer.err


def test_a_root_that_nodes_do_not_share_is_refused(tmp_path: Path) -> None:
    """What runs on a node, given a flag file that the driver wrote where this node cannot see it."""
    from llmft_core.plan import RunPlan
    from llmft_core.preflight import node_problems

    plan = RunPlan.from_json({"strategy": "ddp"}).to_json()
    assert node_problems(plan, "", 0) == []
    seen = tmp_path / "runs" / "flag"
    (problem,) = node_problems(plan, str(seen), 0)
    assert f"storage.root: {seen.parent} is not the driver's folder" in problem


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with fault_proxy(s3_server.endpoint_url) as running:
        yield running


def mirrored(cluster: ThreeNodes, s3_server: S3Server, name: str, folder: Path) -> None:
    """The tiny model in the bucket, under another name."""
    reach = ("--backends.s3.endpoint-url", s3_server.endpoint_url)
    args = ("weights", "mirror", "llama-2-tiny", f"s3://{s3_server.bucket}/cluster", "--as", name, *reach)
    answer = llmft(*args, folder=folder, environment=cluster.environment)
    assert answer.code == 0, answer.err


def from_mirror(s3_server: S3Server, proxy: Proxy, name: str) -> tuple[str, ...]:
    mirror = f"s3://{s3_server.bucket}/cluster"
    return ("--model", name, "--weights.mirror", mirror, "--backends.s3.endpoint-url", proxy.url, "--workers", "2")


def test_each_node_fetches_the_weights_once_and_never_again(
    cluster: ThreeNodes, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    mirrored(cluster, s3_server, "owner/once", tmp_path)
    proxy.heads.clear()
    flags = from_mirror(s3_server, proxy, "owner/once")
    answer = cluster.run(*flags, "--name", "once", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert gets(proxy)["model.safetensors"] == 2, "one request a node: the file is smaller than a chunk"
    proxy.heads.clear()
    again = cluster.run(*flags, "--name", "again", folder=tmp_path)
    assert again.code == 0, again.err
    assert gets(proxy)["model.safetensors"] == 0


def test_nodes_that_share_fetch_each_byte_once_together_and_find_a_damaged_one(
    cluster: ThreeNodes, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    mirrored(cluster, s3_server, "owner/shared", tmp_path)

    def reads_weights(head: bytes) -> bool:
        return head.startswith(b"GET ") and b"owner--shared/model.safetensors" in head

    proxy.faults.append(Fault(reads_weights, flip_answer=1000))
    code, said = stage_shared(cluster, f"s3://{s3_server.bucket}/cluster/owner--shared", proxy.url, folder=tmp_path)
    assert code == 1
    assert "node" in said
    assert "model.safetensors" in said, "one node brings it, and what it brings is verified on both"
    assert not [path for cache in cluster.caches for path in cache.rglob("owner--shared*/model.safetensors")]
    assert s3_server.folder is not None
    source = s3_server.folder / "cluster" / "owner--shared"
    files = {path.name: path.read_bytes() for path in source.iterdir() if path.name != "manifest.json"}
    proxy.heads.clear()
    before = proxy.answered
    flags = from_mirror(s3_server, proxy, "owner/shared")
    answer = cluster.run(*flags, "--weights.share", "--name", "shared", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert gets(proxy)["model.safetensors"] == 1, "the file is smaller than a chunk: one node brings it"
    assert proxy.answered - before < 1.3 * sum(map(len, files.values())), "config and tokenizer go to the driver too"
    for cache in cluster.caches:
        (folder,) = (path for path in cache.glob("mirror/owner--shared-*") if path.is_dir())
        assert {name: (folder / name).read_bytes() for name in files} == files


def in_a_driver(cluster: ThreeNodes, script: str, *args: str, folder: Path, cache: Path) -> str:
    """What a script prints in a driver of its own, connected to the cluster as `llmft run` is."""
    connect = (
        "import sys; from llmft_core.train.cluster import _connected; found = _connected(sys.argv[1], debug=False)"
    )
    command = [sys.executable, "-c", f"{connect}\n{script}", cluster.address, *args]
    environment = {**os.environ, **cluster.environment, "LLMFT_CACHE": str(cache)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


PREPARE = """
from dataclasses import asdict
from pathlib import Path
from llmft_core.data.prepare import prepare
from llmft_core.data.sources import find_sources
from llmft_core.plan import RunPlan
from llmft_plugins.datasets.gsm8k import Gsm8k
sys.path.append(sys.argv[4])
from toy_tokenizers import byte_level_tokenizer
dataset = Gsm8k(Gsm8k.options_type.model_validate({"source": sys.argv[2]}))
for engine in ("local", "ray"):
    plan = RunPlan.model_validate({"data": {"engine": engine, "max-dropped": 1.0}, "context-length": 200})
    sources = find_sources(dataset, None)
    data = prepare(dataset, sources, plan, byte_level_tokenizer(), "print", Path(sys.argv[3]) / engine)
    splits = {split: asdict(one) for split, one in data.report.splits.items()}
    import json
    print(json.dumps([data.report.content_digest, splits], sort_keys=True))
"""


def test_rows_encoded_on_the_nodes_are_those_encoded_here(cluster: ThreeNodes, tmp_path: Path) -> None:
    rows = ({"question": f"{number} " * (1 + number % 150), "answer": str(number)} for number in range(20_000))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (tmp_path / "train.jsonl").stat().st_size > 8 * 2**20, "more blocks than are encoded at once"
    support = str(Path(__file__).parents[1] / "support")
    paths = (str(tmp_path), str(tmp_path / "caches"), support)
    local, ray = in_a_driver(cluster, PREPARE, *paths, folder=tmp_path, cache=tmp_path / "cache").splitlines()
    assert json.loads(local)[1]["train"]["rows"] > 4000
    assert json.loads(local)[1]["train"]["dropped"] > 4000
    assert ray == local
    (first, second) = (
        {path.name: path.read_bytes() for path in (tmp_path / "caches" / engine).rglob("*.npy")}
        for engine in ("local", "ray")
    )
    assert len(first) == 5
    assert second == first


def test_the_ray_engine_needs_a_cluster_elsewhere(tmp_path: Path) -> None:
    answer = llmft("run", "--workers", "0", "--data.engine", "ray", folder=tmp_path)
    assert answer.code == 2, answer.out
    assert "data.engine: ray encodes on the nodes of a cluster elsewhere, and this run has this machine" in answer.err


SHIP = """
from llmft_core import LlmftError
from llmft_core.train.ship import ship
try:
    for _ in range(2):
        print(sorted(node.host for node in ship(found, sys.argv[2:])))
except LlmftError as error:
    print(error)
"""


def test_prepared_data_reaches_the_nodes_in_chunks(cluster: ThreeNodes, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    files = {"train/ids.npy": os.urandom(40 * 2**20), "train/empty": b"", "report.json": b"{}"}
    for name, content in files.items():
        (cache / "data" / "key" / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / "data" / "key" / name).write_bytes(content)
    said = in_a_driver(cluster, SHIP, "data/key", folder=tmp_path, cache=cache).splitlines()
    first, second = map(eval, said)
    assert len(first) == 2
    assert second == [], "they have it"
    for node in cluster.caches:
        there = {path.relative_to(node / "data" / "key").as_posix() for path in (node / "data" / "key").rglob("*")}
        assert there == {*files, "train"}
        assert all((node / "data" / "key" / name).read_bytes() == content for name, content in files.items())
        assert not list((node / "data").glob("*.partial"))


def test_a_node_that_cannot_take_the_data_is_named(cluster: ThreeNodes, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "refused" / "key").mkdir(parents=True)
    (cache / "refused" / "key" / "ids.npy").write_bytes(b"x" * 100)
    (cluster.caches[1] / "refused").write_text("a file where a folder must be")
    said = in_a_driver(cluster, SHIP, "refused/key", folder=tmp_path, cache=cache)
    assert re.fullmatch(r"node \S+ \(127\.0\.0\.1\): cannot write the prepared data to .*refused: .*\n", said), said
    assert not list((cluster.caches[0] / "refused").iterdir()), "nothing half stays on the other node"


def stage_shared(cluster: ThreeNodes, model: str, url: str, *, folder: Path) -> tuple[int, str]:
    """The staging of a run alone, in a driver of its own; its exit code and its error."""
    script = """
import sys
from llmft_core import LlmftError, run
from llmft_core.plan import RunPlan
from llmft_core.train.cluster import _connected
address, model, url = sys.argv[1:]
backends = {"s3": {"endpoint-url": url}}
plan = RunPlan.model_validate({"model": model, "strategy": "ddp", "backends": backends})
found = _connected(address, debug=False)
mailbox = run.open_mailbox()
try:
    run.stage_shared(found, (plan.to_json(), {}, mailbox), run.stage_on_node)
except LlmftError as error:
    sys.exit(str(error))
"""
    command = [sys.executable, "-c", script, cluster.address, model, url]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **cluster.environment}, stderr=subprocess.PIPE, text=True, timeout=240
    )
    return done.returncode, done.stderr.strip()


def gets(proxy: Proxy) -> Counter[str]:
    """How often each object was fetched."""
    lines = [head.split(b"\r\n", 1)[0].decode() for head in proxy.heads]
    return Counter(line.split()[1].partition("?")[0].rpartition("/")[2] for line in lines if line.startswith("GET "))


def test_a_node_that_dies_while_it_fetches_is_named_and_the_other_keeps_what_it_has(
    cluster: ThreeNodes, s3_server: S3Server, proxy: Proxy, tmp_path: Path
) -> None:
    """The last test of this file: a node is gone after it."""
    mirrored(cluster, s3_server, "owner/lost", tmp_path)
    proxy.heads.clear()
    proxy.rate, before = 2**20, proxy.answered
    command = [llmft_path(), "run", "--cluster", cluster.address, *TINY, "--name", "lost"]
    process = subprocess.Popen(
        [*command, *from_mirror(s3_server, proxy, "owner/lost")],
        cwd=tmp_path,
        env={**os.environ, **cluster.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while gets(proxy)["model.safetensors"] < 2 or proxy.answered - before < 2 * 2**20:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    cluster.cluster.remove_node(cluster.nodes[1], allow_graceful=False)
    _, err = process.communicate(timeout=120)
    proxy.rate = None
    assert process.returncode == 1, err
    (line,) = err.splitlines()
    assert "it was lost" in line
    assert "what the other nodes have fetched is kept" in line
    whole = [path.stat().st_size for path in cluster.caches[0].rglob("mirror/owner--lost*/model.safetensors")]
    assert len(whole) == 1
    assert not list(cluster.caches[1].rglob("mirror/owner--lost*/model.safetensors")), "nothing half at its final path"
