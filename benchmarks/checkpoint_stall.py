"""For how long checkpoints hold training: written and uploaded in place, against llmft's snapshot and background.

    python benchmarks/checkpoint_stall.py

Trains a Llama of 1 GB (fp32, random weights) on the CPU with a checkpoint every so many steps to an S3 server (rclone)
behind a proxy that lets 50 MB/s through. The modes take turns, each in a process of its own. Needs the `tests` extra.

Both modes run the same code: `synchronous` waits after each snapshot until the checkpoint is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
MODES = ("synchronous", "llmft")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each mode")
    parser.add_argument("--checkpoints", type=int, default=3, help="of each process")
    parser.add_argument("--every", type=int, default=40, help="optimizer steps between two checkpoints")
    parser.add_argument("--layers", type=int, default=19, help="53 MB each; 19 make 1 GB")
    parser.add_argument("--rate", type=float, default=50e6, help="bytes/s to the server")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--proxy", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.proxy:
        serve(args.proxy, args.rate)
    elif args.worker:
        train(args.worker[0], Path(args.worker[1]), args)
    else:
        with tempfile.TemporaryDirectory(prefix="llmft-stall-") as scratch:
            show(measure(args, Path(scratch)))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each process of each mode said."""
    from servers import rclone_s3

    make_model(folder / "model", args.layers)
    (folder / "server").mkdir()
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with rclone_s3(folder / "server") as server:
        throttled = [sys.executable, __file__, "--proxy", server.endpoint_url, "--rate", str(args.rate)]
        with subprocess.Popen(throttled, stdout=subprocess.PIPE, text=True) as proxy:
            assert proxy.stdout is not None
            environment = {**os.environ, **server.environment, "AWS_ENDPOINT_URL": proxy.stdout.readline().strip()}
            environment["LLMFT_CACHE"] = str(folder / "cache")
            try:
                for number in range(args.rounds):
                    for mode in MODES:
                        command = [sys.executable, __file__, *sys.argv[1:], "--worker", mode, str(folder)]
                        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                        found[mode].append(json.loads(done.stdout.splitlines()[-1]))
                        print(f"round {number + 1}, {mode}: {found[mode][-1]['stalls']}", file=sys.stderr)
            finally:
                proxy.terminate()
    return found


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Medians over all checkpoints and all steps of a mode."""

    def median(mode: str, what: str) -> float:
        return statistics.median(value for run in found[mode] for value in run[what])

    slow = median("synchronous", "stalls")
    print("| | held by one checkpoint | of the synchronous | until it is complete | optimizer steps beside it |")
    print("|---|---|---|---|---|")
    for mode in MODES:
        stall = median(mode, "stalls")
        alone = median(mode, "alone")
        beside = median(mode, "beside") / alone if any(run["beside"] for run in found[mode]) else 1.0
        print(
            f"| {mode} | {stall:.2f} s | {stall / slow:.1%} | {median(mode, 'published'):.1f} s | "
            f"{beside:.2f} × {alone:.2f} s |"
        )
    samples = sum(len(run["stalls"]) for run in found["llmft"])
    print(f"\n{samples} checkpoints a mode; seconds in the snapshot: {median('llmft', 'snapshots'):.2f}")


def serve(upstream: str, rate: float) -> None:
    """The proxy, in a process of its own: training does not share its interpreter."""
    from fault_proxy import fault_proxy

    with fault_proxy(upstream) as proxy:
        proxy.upload_rate = rate
        print(proxy.url, flush=True)
        signal.pause()  # until it is terminated


def make_model(folder: Path, layers: int) -> None:
    from tables import tiny_llama
    from toy_tokenizers import save_toy_tokenizer

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
    tiny_llama(folder, vocabulary=4096, num_hidden_layers=layers, **sizes)
    save_toy_tokenizer(folder / "tokenizer")


def train(mode: str, folder: Path, args: argparse.Namespace) -> None:
    """One process: trains, and prints the seconds as JSON."""
    import torch.distributed as dist
    from tables import InMemory, random_table

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.plan import RunPlan
    from llmft_core.storage.places import Places
    from llmft_core.train.job import Job
    from llmft_core.train.loop import train as loop
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker
    from llmft_core.train.saver import Saver
    from llmft_core.values import Placement

    steps = args.every * args.checkpoints
    plan = RunPlan.from_json(
        {"strategy": "ddp", "lr": 1e-4, "precision": "fp32", "global-batch": 1, "name": "stall", "max-steps": steps}
        | {"checkpoint": {"every-steps": args.every, "every-epochs": 0}}
    )
    placement = Placement(1, "cpu", "fp32", 1, 1, 1.0)
    model = folder / "model"
    job = Job(plan, placement, steps, (steps,), 4096, 0, (), {}, model, Path(), model / "tokenizer")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    catalog = Catalog(load_plugins())
    engine = catalog.create("strategy", {"name": "ddp"}).engine(placement, 0)
    engine.prepare(build_model(job, engine), optimizer_maker(plan))

    data = InMemory(random_table(steps, 4096, 32))

    stalls: list[float] = []
    events: list[dict[str, Any]] = []

    class Recorder:
        def send(self, event: dict[str, Any]) -> None:
            events.append(event)

    name = f"{mode}-{os.getpid()}"
    run = Places(catalog, None, {"s3": {}}).place(f"s3://bucket/{name}")
    with Saver(job, engine, 0, Recorder(), run) as saver:

        def save(step: int, epoch: int, metrics: dict[str, float]) -> None:
            started = time.perf_counter()
            saver.save(step, epoch, metrics)
            if mode == "synchronous":
                saver.background.wait()
            stalls.append(time.perf_counter() - started)

        loop(job, engine, data, 0, saver, save)  # type: ignore[arg-type]
    metrics = [event for event in events if event["kind"] == "metrics"][1:]  # the first step makes its buffers
    seconds = {
        kind: [event["metrics"]["train/step_seconds"] for event in metrics if event["publishing"] == kind]
        for kind in (True, False)
    }
    found = {
        "stalls": stalls,
        "snapshots": [event["seconds"] - event["waited"] for event in events if event["kind"] == "stall"],
        "published": [event["seconds"] for event in events if event["kind"] == "checkpoint"],
        "beside": seconds[True],
        "alone": seconds[False],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
