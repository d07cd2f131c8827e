"""Memory and seconds of a checkpoint's export under ZeRO-3: files that several ranks gather and write, against
`accelerator.get_state_dict` and `save_pretrained` on rank 0.

    python benchmarks/export.py

Two ranks on CPU hold a Llama of random weights in bf16. The modes take turns, each in processes of its own. `in turn`:
a rank gathers one file, writes it, and goes on to the next. `in the background`, what a run does where the memory has
room: a rank first gathers all files that it writes, so that training can go on. Needs the `tests` extra.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
MODES = ("accelerate", "in turn", "in the background")
RANKS = 2
MIB = 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each mode")
    parser.add_argument("--layers", type=int, default=16, help="of 26 MB each in bf16")
    parser.add_argument("--shard", type=int, default=64, help="MiB of a file at most")
    args = parser.parse_args()
    from ranks import on_ranks
    from tables import tiny_llama

    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # in the ranks: what is freed is no longer resident, in all modes
    found: dict[str, list[list[dict[str, float]]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="llmft-export-") as scratch:
        folder = Path(scratch)
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
        tiny_llama(folder / "model", vocabulary=4096, num_hidden_layers=args.layers, **sizes)
        for number in range(args.rounds):
            for mode in MODES:
                answers = on_ranks(RANKS, export, mode, str(folder / "model"), scratch, args.shard * MIB)
                found[mode].append(answers)
                print(f"round {number + 1}, {mode}: {answers}", file=sys.stderr)
    show(found)


def show(found: dict[str, list[list[dict[str, float]]]]) -> None:
    """Medians."""
    sizes = {answers[0]["model"] for rounds in found.values() for answers in rounds}
    print(f"A model of {sizes.pop() / MIB:.0f} MiB in bf16, {RANKS} ranks.\n")
    print("| | peak memory beside the model, rank 0 | rank 1 | seconds |")
    print("|---|---|---|---|")
    for mode, rounds in found.items():
        peaks = [statistics.median(answers[rank]["peak"] for answers in rounds) / MIB for rank in range(RANKS)]
        seconds = statistics.median(max(one["seconds"] for one in answers) for answers in rounds)
        print(f"| {mode} | {peaks[0]:.0f} MiB | {peaks[1]:.0f} MiB | {seconds:.2f} |")


def export(rank: int, mode: str, base: str, scratch: str, shard: int) -> dict[str, float]:
    """Export once on this rank: bytes of resident memory at most beside those before it, and seconds."""
    import torch.distributed as dist

    from llmft_core.catalog import Catalog
    from llmft_core.checkpoint.export import WeightWriter
    from llmft_core.checkpoint.snapshot import gather, lay_out
    from llmft_core.loading import load_plugins
    from llmft_core.plan import RunPlan
    from llmft_core.train.job import Job
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker
    from llmft_core.values import Placement

    plan = RunPlan.from_json({"strategy": "zero-3", "lr": 1e-4, "precision": "bf16", "global-batch": 2})
    placement = Placement(RANKS, "cpu", "bf16", 1, 1, 1.0)
    job = Job(plan, placement, 1, (1,), 4096, 0, (), {}, Path(base), Path(), Path())
    engine: Any = Catalog(load_plugins()).create("strategy", {"name": "zero-3"}).engine(placement, rank)
    engine.prepare(build_model(job, engine), optimizer_maker(plan))
    engine.model._config.zero_config.gather_16bit_weights_on_model_save = True  # accelerate refuses without
    layout = lay_out(engine, plan, RANKS, shard)
    folder = Path(tempfile.mkdtemp(dir=scratch)) if rank == 0 else Path(scratch) / f"of-rank-{rank}"
    folder.mkdir(exist_ok=True)
    model_bytes = float(sum(layout.bytes_of(writer) for writer in range(RANKS)))
    dist.barrier()
    with Peak() as peak:
        started = time.perf_counter()
        if mode == "accelerate":
            state = engine.accelerator.get_state_dict(engine.model)
            if rank == 0:
                engine.bare_model.save_pretrained(folder, state_dict=state, max_shard_size=shard)
        else:
            writer = WeightWriter(layout, Path(base), folder)
            if mode == "in turn":
                gather(engine, layout, rank, writer.write)
            else:
                files: dict[str, Any] = {}
                gather(engine, layout, rank, files.__setitem__)
                while files:
                    writer.write(*files.popitem())
        dist.barrier()
        seconds = time.perf_counter() - started
    engine.finish()
    return {"peak": peak.bytes, "seconds": seconds, "model": model_bytes}


class Peak:
    """The most resident memory of this process within the block, beside that at its beginning. Pages of files that are
    mapped, as the base model's are, belong to the machine's cache and are not counted."""

    def __enter__(self) -> Peak:
        self.bytes, self._ends = 0.0, threading.Event()
        self._before = _anonymous()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ends.wait(0.002):
            self.bytes = max(self.bytes, _anonymous() - self._before)

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()


def _anonymous() -> float:
    """Bytes of resident memory that is no file's."""
    resident, shared = (int(field) for field in Path("/proc/self/statm").read_text().split()[1:3])
    return float((resident - shared) * os.sysconf("SC_PAGE_SIZE"))


if __name__ == "__main__":
    main()
