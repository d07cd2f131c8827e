"""Seconds from the command to the first optimizer step: `llmft run`, against a plain Ray Train script.

    python benchmarks/startup.py

Both train the built-in tiny model on two workers, with the same libraries. They take turns. The plain script has Ray
Train's own settings, prepares no data, checks nothing and writes no checkpoint. The data and the model of `llmft run`
lie in its cache: a run before the first round makes them. Then `llmft run --workers 0`, in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PHASES = {
    "preparing dataset": "plugins, plan, PyTorch, tokenizer",
    "starting": "data, checks",
    "loading the model": "Ray and its workers",
    "step 1/": "model, optimizer, first step",
}
"""What a line of `llmft run` says → what the seconds before it went into."""

PLAIN = """
import sys
import ray
import ray.train
import torch
import transformers
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config):
    import accelerate
    import torch
    from transformers import AutoModelForCausalLM

    if config["zero"]:
        import deepspeed
    accelerator = accelerate.Accelerator(cpu=True)
    model = AutoModelForCausalLM.from_pretrained(config["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.randint(3, 1000, (2, 128))
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    open(config["done"], "w").close()
    ray.train.report({"step": 1})


ray.init(num_cpus=max(2, torch.get_num_threads()), include_dashboard=False)
model, folder, zero = sys.argv[1:]
TorchTrainer(
    train,
    train_loop_config={"model": model, "done": folder + "/done", "zero": zero == "yes"},
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path=folder),
).fit()
"""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each")
    parser.add_argument(
        "--strategy", default="ddp", help="of llmft; with zero-… the plain script imports deepspeed too"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmft-startup-") as scratch:
        folder = Path(scratch)
        (folder / "plain.py").write_text(PLAIN)
        llmft(folder, "warm", 0, args.strategy)
        found: dict[str, list[dict[str, float]]] = {"--workers 2": [], "--workers 0": []}
        plain: list[float] = []
        for number in range(args.rounds):
            found["--workers 2"].append(llmft(folder, f"two-{number}", 2, args.strategy))
            plain.append(plain_script(folder, number, args.strategy))
            found["--workers 0"].append(llmft(folder, f"none-{number}", 0, args.strategy))
            seconds = {name: round(sum(rounds[-1].values()), 1) for name, rounds in found.items()}
            print(
                f"round {number + 1}: {seconds}, plain {plain[-1]:.1f}, load {os.getloadavg()[0]:.1f}", file=sys.stderr
            )
        show(found, plain)


def show(found: Mapping[str, list[dict[str, float]]], plain: list[float]) -> None:
    """Medians."""
    print("| seconds | " + " | ".join(f"llmft run {name}" for name in found) + " |")
    print("|---|" + "---|" * len(found))
    for what in PHASES.values():
        print(f"| {what} | " + " | ".join(f"{median(rounds, what):.1f}" for rounds in found.values()) + " |")
    totals = {name: statistics.median(sum(one.values()) for one in rounds) for name, rounds in found.items()}
    print("| **to the first step** | " + " | ".join(f"**{total:.1f}**" for total in totals.values()) + " |")
    ratio = totals["--workers 2"] / statistics.median(plain)
    print(f"\nA plain Ray Train script on 2 workers: {statistics.median(plain):.1f} s; llmft takes {ratio:.2f} of it.")


def median(rounds: list[dict[str, float]], what: str) -> float:
    """Of one phase."""
    return statistics.median(one[what] for one in rounds)


def llmft(folder: Path, name: str, workers: int, strategy: str) -> dict[str, float]:
    """Seconds of each phase of one run, which goes on to its end before this returns."""
    flags = [
        "--workers",
        str(workers),
        "--strategy",
        strategy,
        "--name",
        name,
        "--global-batch",
        "4",
        "--max-steps",
        "2",
    ]
    command = [str(Path(sys.executable).parent / "llmft"), "run", *flags]
    seconds: dict[str, float] = {}
    left = dict(PHASES)

    def look_at(line: str, since: float) -> None:
        for start in list(left):
            if start in line:
                seconds[left.pop(start)] = since - sum(seconds.values())
                return

    watch(command, folder, look_at)
    if left:
        raise SystemExit(f"llmft run never said {', '.join(left)}")
    return seconds


def plain_script(folder: Path, number: int, strategy: str) -> float:
    """Seconds until a worker has done its first step."""
    own = folder / f"plain-{number}"
    own.mkdir()
    model = folder / "llmft-runs" / "runs" / "warm" / "checkpoint_00000"
    zero = "yes" if strategy.startswith("zero") else "no"
    started = time.time()  # the wall clock, which the file's time is of
    watch([sys.executable, str(folder / "plain.py"), str(model), str(own), zero], folder, lambda line, since: None)
    return (own / "done").stat().st_mtime - started


def watch(command: list[str], folder: Path, look_at: Callable[[str, float], None]) -> None:
    """Run a command to its end; `look_at` gets each line of its output, and the seconds since it was started."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    environment["LLMFT_CACHE"] = str(folder / "cache")
    errors = folder / "errors.txt"
    started = time.perf_counter()
    with (
        errors.open("w") as sink,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=sink, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            look_at(line, time.perf_counter() - started)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
