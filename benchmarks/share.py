"""`--weights.share` against every node for itself: seconds until all nodes have all bytes, verified and on disk.

    python benchmarks/share.py --nodes 2 3 4 --size-mib 400 --rate 100 --rounds 5

Needs the `tests` extra (rclone). The nodes are those of a real Ray cluster on this machine, each with a raylet, an
object store and a cache folder of its own, so what they exchange goes from store to store over loopback as it would
over a network, only that one machine does the work of all. What runs on them is the code of `llmft run`. The server is
rclone behind a proxy with a process of its own that lets through so many MB/s: in `server` one proxy for all nodes, in
`node` one proxy (and the same rate) for each, as S3 behaves until a bucket's limits are reached. Both ways take turns,
with empty caches; what shares starts new actors each time, what does not finds Ray's workers warm from before.
The model is random bytes with a manifest, in four shards. `sent` is what the proxies sent, in copies of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SUPPORT = REPOSITORY / "tests" / "support"
sys.path[:0] = [str(SUPPORT)]
MIB = 2**20

PROXY = """
import sys
from fault_proxy import fault_proxy
with fault_proxy(sys.argv[1]) as proxy:
    proxy.rate = float(sys.argv[2])
    print(proxy.url, flush=True)
    for line in sys.stdin:  # asked after each round, ended by the end of stdin
        print(proxy.answered, flush=True)
        proxy.heads.clear()
"""


class Throttle:
    """A proxy process of so many bytes/s."""

    def __init__(self, upstream: str, rate: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROXY, upstream, str(rate)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SUPPORT)},
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def sent(self) -> int:
        """Bytes of all answers so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)


def lay_model(folder: Path, mirror: str, size: int) -> None:
    """A model of four shards as `llmft weights mirror` stores it."""
    source = folder / "model"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "tokenizer.json").write_text("{}")
    names = [f"model-{number}-of-00004.safetensors" for number in ("00001", "00002", "00003", "00004")]
    for name in names:
        (source / name).write_bytes(os.urandom(size // 4))
    weight_map = {str(number): name for number, name in enumerate(names)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", "from llmft_core.cli.main import entry_point; entry_point()"]
    command += ["weights", "mirror", str(source), mirror, "--as", "owner/large"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(source)


@contextmanager
def cluster(nodes: int, caches: list[Path]) -> Iterator[None]:
    """Ray with a head without workers and so many nodes; this process is connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    loopback = {"node_ip_address": "127.0.0.1"}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **loopback})
    try:
        for cache in caches[:nodes]:
            started.add_node(num_cpus=1, env_vars={"LLMFT_CACHE": str(cache)}, object_store_memory=2**30, **loopback)
        started.wait_for_nodes()
        ray.init(address=started.address, log_to_driver=False, logging_level="ERROR", configure_logging=True)
        yield
    finally:
        ray.shutdown()
        started.shutdown()


def fetch_on_node(plan_json: Any, urls: dict[str, str], sharer: Any = None) -> str:
    """What a node of a run does, with the proxy that is this node's; the model's folder."""
    from llmft_core.run import stage_on_node

    plan_json["backends"] = {"s3": {"endpoint-url": urls[os.environ["LLMFT_CACHE"]]}}
    return stage_on_node(plan_json, {}, [], sharer)["model"]


def fetch(share: bool, urls: dict[str, str]) -> float:
    """Seconds until all nodes have the model, by the code of a run."""
    from llmft_core import run
    from llmft_core.plan import RunPlan
    from llmft_core.train.cluster import Cluster, _nodes, on_each_node

    plan = RunPlan.model_validate({"model": "s3://bucket/models/owner--large", "strategy": "ddp"}).to_json()
    there = Cluster("elsewhere", _nodes())
    began = time.monotonic()
    if share:
        run.stage_shared(there, (plan, urls), fetch_on_node)
    else:
        on_each_node(there, fetch_on_node, plan, urls)
    return time.monotonic() - began


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--size-mib", type=int, default=400)
    parser.add_argument("--rate", type=float, default=100, help="MB/s of the server, or of each node's way to it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--throttle", nargs="+", choices=("server", "node"), default=["server", "node"])
    options = parser.parse_args()
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        PYTHONPATH=os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "plugins"), str(REPOSITORY / "benchmarks")]),
    )
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "plugins")]
    from servers import rclone_s3

    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="llmft-share-")))
        server = ending.enter_context(rclone_s3(folder / "server"))
        os.environ.update(server.environment, AWS_ENDPOINT_URL=server.endpoint_url, LLMFT_CACHE=str(folder / "driver"))
        size = options.size_mib * MIB
        lay_model(folder, "s3://bucket/models", size)
        caches = [folder / f"node{number}" for number in range(max(options.nodes))]
        proxies = [Throttle(server.endpoint_url, options.rate * 1e6) for _ in caches]
        for proxy in proxies:
            ending.callback(proxy.close)
        print("| throttled | nodes | each for itself, s | sent | shared, s | sent | gain |")
        print("|---|---|---|---|---|---|---|")
        for nodes in options.nodes:
            for throttle in options.throttle:
                own = [proxies[0]] * nodes if throttle == "server" else proxies[:nodes]
                urls = {str(cache): proxy.url for cache, proxy in zip(caches, own, strict=False)}
                seconds: dict[bool, list[float]] = {False: [], True: []}
                sent: dict[bool, list[float]] = {False: [], True: []}
                with cluster(nodes, caches):
                    for turn in range(2 * options.rounds + 1):
                        for cache in caches:
                            shutil.rmtree(cache, ignore_errors=True)
                        before = sum(proxy.sent() for proxy in proxies)
                        took = fetch(bool(turn % 2), urls)
                        if turn:  # the first one starts Ray's workers
                            seconds[bool(turn % 2)].append(took)
                            sent[bool(turn % 2)].append((sum(proxy.sent() for proxy in proxies) - before) / size)
                cells = [
                    f"**{statistics.median(seconds[share]):.1f}** ({min(seconds[share]):.1f} to "
                    f"{max(seconds[share]):.1f}) | {statistics.median(sent[share]):.2f}"
                    for share in (False, True)
                ]
                gain = statistics.median(seconds[False]) / statistics.median(seconds[True])
                print(f"| {throttle} | {nodes} | {cells[0]} | {cells[1]} | {gain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
