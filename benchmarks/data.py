"""Preparing data side by side: llmft, datasets.map, TRL, and the raw tokenizer on all cores as the ceiling.

    pip install -e '.[benchmarks]'
    python benchmarks/data.py --rounds 3 --rows 750000

Needs GSM8K (train.jsonl) and Llama-2's tokenizer.model in --shared. From GSM8K's rows as many distinct ones are made as
are asked for: the order of sentences and all numbers change, the lengths do not.

Every measurement is a process of its own with a cache of its own; the candidates take turns, so that a noisy machine
disturbs all of them alike. The clock starts when imports and tokenizer are done, and stops when what was made lies on
the disk. Memory is the largest sum of PSS over the candidate's processes, sampled ten times a second. What each does:

- llmft: reads and hashes the file, checks every row, finds rows that occur twice, encodes, writes the token cache and
  packs the first epoch.
- llmft, warm: the same again in a new process, with the cache there.
- datasets.map: load_dataset("json"), then the tokenizer on whole texts in batches, one process a core. No labels, no
  checks, no packing.
- TRL: load_dataset("json"), then what SFTTrainer does with prompt and completion, and its packing; one process a core.
- tokenizer: the ceiling: encode_batch_fast on whole texts that are in memory already, on all cores; nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TAGS = ("<START_Q>", "<END_Q>", "<START_A>", "<END_A>")
CONTEXT = 2048  # tokens; no row of GSM8K is longer, so all candidates keep all rows
CORES = len(os.sched_getaffinity(0))
Candidate = Callable[[Path, Path, Any], Callable[[], dict[str, Any]]]
"""(rows, an empty or earlier cache, tokenizer) → what is timed; it says how many rows and tokens it has made."""


def tokenizer_of(shared: Path) -> Any:
    """Llama-2's, with the tags of GSM8K."""
    from llmft_plugins.models.llama2 import from_sentencepiece

    tokenizer = from_sentencepiece(shared / "llama2-tokenizer" / "tokenizer.model")
    tokenizer.add_tokens(list(TAGS), special_tokens=True)
    return tokenizer


def make_rows(gsm8k: Path, count: int, target: Path) -> None:
    """So many distinct rows of GSM8K's form and lengths. A pure function of the count."""
    originals = [json.loads(line) for line in gsm8k.read_text(encoding="utf-8").strip().split("\n")]
    draw, seen = random.Random(0), set()
    shifted_digits = [str.maketrans("0123456789", ("0123456789" * 2)[by : by + 10]) for by in range(10)]
    with target.open("w", encoding="utf-8") as file:
        while len(seen) < count:
            row = draw.choice(originals)
            question = row["question"].translate(draw.choice(shifted_digits))
            answer = row["answer"].translate(draw.choice(shifted_digits))
            *sentences, last = re.split(r"(?<=[.?!]) ", question)
            draw.shuffle(sentences)
            line = json.dumps({"question": " ".join([*sentences, last]), "answer": answer}, ensure_ascii=False)
            if hash(line) not in seen:
                seen.add(hash(line))
                file.write(line + "\n")


def llmft(rows: Path, cache: Path, tokenizer: Any) -> Callable[[], dict[str, Any]]:
    """Ours."""
    from llmft_core import SourceOptions
    from llmft_core.data.order import Order
    from llmft_core.data.prepare import prepare
    from llmft_core.plan import RunPlan
    from llmft_plugins.datasets.gsm8k import Gsm8k

    dataset = Gsm8k(Gsm8k.options_type.model_validate({"train": str(rows)}))
    assert isinstance(dataset.options, SourceOptions)
    plan = RunPlan.model_validate({"context-length": CONTEXT, "data": {"packing": "best-fit"}})

    def timed() -> dict[str, Any]:
        data = prepare(dataset, plan, tokenizer, "print", None, cache)
        packed = len(Order.of(data.train, plan).epoch(0))
        return {"rows": len(data.train), "tokens": data.report.splits["train"].tokens, "packed": packed}

    return timed


def datasets_map(rows: Path, cache: Path, tokenizer: Any) -> Callable[[], dict[str, Any]]:
    """Hugging Face datasets."""
    import datasets

    datasets.disable_progress_bars()

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        pairs = zip(batch["question"], batch["answer"], strict=True)
        texts = [f"<START_Q>{question}<END_Q><START_A>{answer}<END_A>" for question, answer in pairs]
        return {"input_ids": tokenizer(texts)["input_ids"]}

    def timed() -> dict[str, Any]:
        loaded = datasets.load_dataset("json", data_files=str(rows), cache_dir=str(cache), split="train")
        made = loaded.map(encode, batched=True, remove_columns=["question", "answer"], num_proc=CORES)
        return {"rows": len(made)}

    return timed


def trl(rows: Path, cache: Path, tokenizer: Any) -> Callable[[], dict[str, Any]]:
    """What SFTTrainer's constructor does with a dataset, called without the model that the trainer wants."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    settings = SFTConfig(
        output_dir=str(cache),
        max_length=CONTEXT,
        packing=True,
        dataset_num_proc=CORES,
        completion_only_loss=True,
        eos_token="<END_A>",
        bf16=False,
        use_cpu=True,
    )
    tokenizer.eos_token = "<END_A>"
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)

    def form(row: dict[str, str]) -> dict[str, str]:
        return {"prompt": f"<START_Q>{row['question']}<END_Q><START_A>", "completion": f"{row['answer']}<END_A>"}

    def timed() -> dict[str, Any]:
        loaded = datasets.load_dataset("json", data_files=str(rows), cache_dir=str(cache), split="train")
        formed = loaded.map(form, remove_columns=["question", "answer"], num_proc=CORES)
        made = SFTTrainer._prepare_dataset(trainer, formed, tokenizer, settings, True, None, "train")
        return {"rows": len(formed), "packed": len(made)}

    return timed


def raw(rows: Path, cache: Path, tokenizer: Any) -> Callable[[], dict[str, Any]]:
    """The ceiling."""
    lines = map(json.loads, rows.read_text(encoding="utf-8").strip().split("\n"))
    texts = [f"<START_Q>{row['question']}<END_Q><START_A>{row['answer']}<END_A>" for row in lines]

    def timed() -> dict[str, Any]:
        for start in range(0, len(texts), 8192):
            tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 8192])
        return {"rows": len(texts)}

    return timed


CANDIDATES: dict[str, Candidate] = {
    "llmft": llmft,
    "llmft, warm": llmft,
    "datasets.map": datasets_map,
    "TRL": trl,
    "tokenizer": raw,
}


def measure(name: str, rows: Path, cache: Path, shared: Path) -> None:
    """In the candidate's own process: one timed run; prints what it found as JSON."""
    timed = CANDIDATES[name](rows, cache, tokenizer_of(shared))
    times, started = os.times(), time.perf_counter()
    found = timed()
    seconds, after = time.perf_counter() - started, os.times()
    cpu = sum(after[:4]) - sum(times[:4])
    print(json.dumps({**found, "seconds": seconds, "cpu_seconds": cpu}))


def memory(process: Any) -> int:
    """PSS of a process and all its children, in bytes."""
    import psutil

    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def run(name: str, rows: Path, cache: Path, shared: Path) -> dict[str, Any]:
    """Start a candidate, watch its memory, and return what it printed."""
    import psutil

    command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, "--rows-file", str(rows)]
    command += ["--cache", str(cache), "--shared", str(shared)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                peak = max(peak, memory(watched))
            except psutil.Error:
                break
            time.sleep(0.1)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{name} failed")
    return {**json.loads(output.splitlines()[-1]), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=750_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(CANDIDATES), help="candidates, separated by commas and a space")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "llmft-benchmark-data")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--rows-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.rows_file, given.cache, given.shared)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    rows, caches = given.folder / f"train-{given.rows}.jsonl", given.folder / "caches"
    if not rows.exists():
        draft = rows.with_suffix(".draft")
        make_rows(given.shared / "gsm8k" / "train.jsonl", given.rows, draft)
        draft.rename(rows)
    time.sleep(3)  # a file that was just written is hashed again: see docs/data-cache.md
    names = [name for name in CANDIDATES if name in given.only]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(given.rounds):
        shutil.rmtree(caches, ignore_errors=True)
        for name in names:
            found[name].append(run(name, rows, caches / name.partition(",")[0], given.shared))
            print(f"round {number + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    shutil.rmtree(caches, ignore_errors=True)
    print(f"{given.rows} rows, {rows.stat().st_size / 1e6:.0f} MB, {CORES} cores, median of {given.rounds}\n")
    print("| | seconds | rows/s | of the ceiling | CPU µs a row | peak memory |")
    print("|---|---|---|---|---|---|")
    medians = {name: statistics.median(one["seconds"] for one in found[name]) for name in names}
    for name in names:
        seconds = [one["seconds"] for one in found[name]]
        cpu = statistics.median(one["cpu_seconds"] for one in found[name])
        peak = max(one["peak"] for one in found[name])
        share = f"{medians['tokenizer'] / medians[name]:.2f}" if "tokenizer" in medians else ""
        print(
            f"| {name} | {medians[name]:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
            f"{given.rows / medians[name]:.0f} | {share} | {1e6 * cpu / given.rows:.0f} | {peak / 2**20:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
