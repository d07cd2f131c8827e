"""Loading a model under ZeRO-3, two ways side by side: transformers' from_pretrained, and slices read by every rank.

    python benchmarks/load.py --ranks 2 --size-mib 768 --rounds 3

Every measurement is a process group of its own; the ways take turns. Of each rank: by how much its memory had grown at
the peak while it loaded, what it allocated (anonymous) and all that was resident (with pages of mapped files, which
the system can take back); what it read by system calls (`rchar`); seconds. Made ready before: imports, the process
group, the engine and a tiny model, so that what libraries allocate once is not counted. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

MIB = 2**20
WAYS = ("from_pretrained", "slices")


def make_model(folder: Path, size_mib: int, hidden: int = 1024, vocabulary: int = 16384) -> int:
    """A Llama of about this size in fp32, in files of 200 MB; its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layer = 4 * hidden * hidden + 3 * hidden * 2816  # elements
    layers = max(1, (size_mib * MIB // 4 - 2 * vocabulary * hidden) // layer)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Watch:
    """Looks at this process's memory every 2 ms."""

    def __init__(self) -> None:
        self.base, self.peak = self.now(), (0, 0)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    @staticmethod
    def now() -> tuple[int, int]:
        """(anonymous, all) bytes."""
        pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
        return (pages[1] - pages[2]) * 4096, pages[1] * 4096

    def look(self) -> None:
        while not self.ended.wait(0.002):
            now = self.now()
            self.peak = max(self.peak[0], now[0]), max(self.peak[1], now[1])

    def end(self) -> tuple[int, int]:
        """How far both have grown at their peaks."""
        self.ended.set()
        self.thread.join()
        return self.peak[0] - self.base[0], self.peak[1] - self.base[1]


def bytes_asked() -> int:
    """Bytes that this process has read by system calls; mapped pages are not among them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def on_rank(rank: int, ranks: int, way: str, folder: Path, tiny: Path, port: int) -> dict[str, Any]:
    """Load once."""
    os.environ.update(
        {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=f"{port}",
    )
    import torch
    import torch.distributed as dist

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.train.model import load, load_whole
    from llmft_core.values import Placement
    from llmft_core.weights.tensors import TensorFiles

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    placement = Placement(ranks, "cpu", "fp32", 1, 1, 1.0)
    engine = Catalog(load_plugins()).create("strategy", {"name": "zero-3"}).engine(placement, rank)

    def once(where: Path) -> torch.nn.Module:
        if way == "from_pretrained":
            with patch.object(engine, "building", nullcontext):  # as it comes: zero.Init sends every new parameter
                return load_whole(where, engine)
        with TensorFiles(where) as files:
            return load(where, engine, files, print)

    once(tiny)
    dist.barrier()
    watch, asked, started = Watch(), bytes_asked(), time.perf_counter()
    model = once(folder)
    dist.barrier()
    seconds, asked = time.perf_counter() - started, bytes_asked() - asked
    anonymous, resident = watch.end()
    held = sum(part.numel() * 4 for part in {id(p): p.ds_tensor for p in model.parameters()}.values())
    dist.barrier()
    dist.destroy_process_group()
    return {"anonymous": anonymous, "resident": resident, "asked": asked, "seconds": seconds, "held": held}


def measure(way: str, ranks: int, folder: Path, tiny: Path) -> list[dict[str, Any]]:
    """One process group; what each rank says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--ranks", str(ranks), "--way", way, "--folders", str(folder), str(tiny)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            [*command, "--port", str(port), "--rank", str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=900)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{way}: exit codes {[process.returncode for process in processes]}")
    return [json.loads(text.strip().splitlines()[-1]) for text in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size-mib", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    for hidden in ("--way", "--rank", "--port"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(on_rank(int(given.rank), given.ranks, given.way, *given.folders, int(given.port))))
        return
    with tempfile.TemporaryDirectory() as root:
        folder, tiny = Path(root) / "model", Path(root) / "tiny"
        size = make_model(folder, given.size_mib)
        make_model(tiny, 1, hidden=32, vocabulary=64)
        found: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way in WAYS:
                found[way].append(measure(way, given.ranks, folder, tiny))
        print(f"model: {size / MIB:.0f} MiB of fp32 in files; {given.ranks} ranks; medians of {given.rounds}\n")
        print("| way | rank | allocated at peak | resident at peak | holds afterwards | read by calls | seconds |")
        print("|---|---|---|---|---|---|---|")
        for way, rounds in found.items():
            for rank in range(given.ranks):
                mine = {key: [answers[rank][key] for answers in rounds] for key in rounds[0][rank]}
                cells = [
                    f"{statistics.median(mine[key]) / MIB:.0f} MiB"
                    for key in ("anonymous", "resident", "held", "asked")
                ]
                print(f"| {way} | {rank} | {' | '.join(cells)} | {statistics.median(mine['seconds']):.1f} |")


if __name__ == "__main__":
    main()
