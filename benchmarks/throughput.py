"""Real tokens per second of training, side by side: llmft, bare loops, TRL, and the seed system's way.

    pip install -e '.[benchmarks]'
    python benchmarks/throughput.py --rounds 5

Needs GSM8K (train.jsonl) and Llama-2's tokenizer.model in --shared. A Llama of 21 million random weights (hidden size
256, 6 layers, vocabulary 32,004), fp32, AdamW, gradients clipped, contexts of 512, micro-batches of 8 rows and as many
in an optimizer step, on the CPU with --threads threads. All train the same rows of GSM8K; a round is one pass over
them. Real tokens are those of the rows, without padding, whatever is computed beside them.

Every candidate is a process of its own, and does one optimizer step when it is told to; they take turns step by step,
so that a noisy machine disturbs all of them alike. While one computes, the others wait for a line of input. The seconds
of its own threads are counted beside those of the clock: they tell something even where other programs take the cores.

What each does:

- llmft: the worker as `llmft run --workers 0` starts it, with packing; its loop, its data path, its metrics.
- llmft --compile: the same with that flag. It compiles before its first step, in the pass that does not count, and says
  on standard error how long that took.
- bare, trained positions: a PyTorch loop over rows that were packed and put into tensors before the clock starts; the
  output layer and the cross-entropy at the positions that predict a trained token. The upper bound.
- bare, all logits: the same loop, with logits at all positions.
- TRL: SFTTrainer with packing and completion-only loss, as it comes; its rows are tokenised before.
- seed: every row padded to 512 tokens, loss on all of them, prompts and padding included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CONTEXT, MICRO_BATCH, LEARNING_RATE = 512, 8, 1e-4
Candidate = Callable[[Path, int, Callable[[bool], None]], None]
"""(folder, passes, done): trains for so many passes, and calls `done(end of a pass)` after every optimizer step."""


def make(shared: Path, folder: Path, rows: int) -> None:
    """The rows, the tokenizer and the model, in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmft_plugins.models.llama2 import from_sentencepiece

    lines = (shared / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").split("\n")[:rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = from_sentencepiece(shared / "llama2-tokenizer" / "tokenizer.model")
    tokenizer.add_tokens(["<START_Q>", "<END_Q>", "<START_A>", "<END_A>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    prepared(folder)


def plan_of(rounds: int = 1, *, compiled: bool = False) -> Any:
    """The plan of our candidates, by which the rows of all are encoded."""
    from llmft_core.plan import RunPlan

    settings = {"epochs": rounds, "schedule": "constant", "lr": LEARNING_RATE, "global-batch": MICRO_BATCH}
    settings["compile"] = compiled
    data = {"packing": "best-fit", "on-long": "truncate"}
    written = {"checkpoint": {"every-epochs": 0}, "state": {"every-minutes": 0}, "tracker": []}
    return RunPlan.from_json({"name": "r", "strategy": "ddp", "precision": "fp32", "data": data, **settings, **written})


def prepared(folder: Path) -> Any:
    """The rows, encoded; from the cache after the first time."""
    from transformers import AutoTokenizer

    from llmft_core.data.prepare import prepare
    from llmft_core.data.sources import find_sources
    from llmft_plugins.datasets.gsm8k import Gsm8k

    dataset = Gsm8k(Gsm8k.options_type.model_validate({"train": str(folder / "train.jsonl")}))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return prepare(dataset, find_sources(dataset, None), plan_of(), tokenizer, "print", folder / "cache")


def llmft(folder: Path, rounds: int, done: Callable[[bool], None], *, compiled: bool = False) -> None:
    """Ours."""
    from llmft_core.data.order import Order
    from llmft_core.data.steps import epoch_steps, total_steps
    from llmft_core.train.failures import Watch
    from llmft_core.train.job import Job
    from llmft_core.train.launch import train_in_process
    from llmft_core.train.stopping import Stop
    from llmft_core.values import Placement

    plan, data = plan_of(rounds, compiled=compiled), prepared(folder)
    plan = plan.model_copy(update={"storage": {"name": "local", "root": str(folder / "runs")}})
    placement = Placement(1, "cpu", "fp32", MICRO_BATCH, 1, plan.max_grad_norm)
    steps = epoch_steps(Order.of(data.train, plan), plan, placement, None)
    total, places = total_steps(plan, steps), [folder / "model", data.folder, folder / "tokenizer"]
    job = Job(plan, placement, total, steps, 32004, 0, (), {}, *places)

    def heard(event: dict[str, Any]) -> None:
        if event["kind"] == "metrics":
            done(job.locate(event["step"] - 1)[1] == steps[0] - 1)
        elif event["kind"] in ("phase", "warning") and compiled:
            print(f"llmft --compile: {event['text']}", file=sys.stderr, flush=True)

    stop = Stop()
    train_in_process(job, Watch(heard, job, stop), stop)


def batches_of(folder: Path, packed: bool) -> Iterator[Any]:
    """The micro-batches of one pass: packed rows, or one row each, padded to the context."""
    from llmft_core.data.batches import Form, rank_micro_batches, steps_of
    from llmft_core.data.order import Order
    from llmft_core.values import Placement

    table = prepared(folder).train
    epoch = Order(table.lengths, 0, CONTEXT if packed else 0).epoch(0)
    layout = Placement(1, "cpu", "fp32", MICRO_BATCH, 1, 1.0)
    for number in range(steps_of(len(epoch), MICRO_BATCH, drop_last=False)):
        form = Form(0, packed, 2 if packed else CONTEXT)
        yield from rank_micro_batches(table, epoch.step(number, MICRO_BATCH), layout, 0, form)


def bare_loop(folder: Path, rounds: int, done: Callable[[bool], None], packed: bool, loss: Callable[..., Any]) -> None:
    """PyTorch's loop, with `loss(model, input_ids, labels, position_ids)` in nats per trained token."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "model").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    names = ("input_ids", "labels", "position_ids")
    made = [[getattr(batch, name) for name in names] for batch in batches_of(folder, packed)]
    tensors = [[None if one is None else torch.from_numpy(one) for one in batch] for batch in made]
    for _ in range(rounds):
        for number, batch in enumerate(tensors):
            loss(model, *batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done(number == len(tensors) - 1)


def all_logits(model: Any, input_ids: Any, labels: Any, position_ids: Any) -> Any:
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def trained_logits(model: Any, input_ids: Any, labels: Any, position_ids: Any) -> Any:
    from torch.nn.functional import cross_entropy

    hidden = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state[:, :-1]
    trained = labels[:, 1:] != -100
    return cross_entropy(model.lm_head(hidden[trained]), labels[:, 1:][trained])


def seed_loss(model: Any, input_ids: Any, labels: Any, position_ids: Any) -> Any:
    return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


def trl(folder: Path, rounds: int, done: Callable[[bool], None]) -> None:
    """SFTTrainer."""
    import datasets
    from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    table, rows = prepared(folder).train, []
    for number in range(len(table)):
        there = slice(table.offsets[number], table.offsets[number] + table.lengths[number])
        mask = (table.trained[there] != 0).astype(int).tolist()
        rows.append({"input_ids": table.ids[there].tolist(), "completion_mask": mask})
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=CONTEXT,
        packing=True,
        completion_only_loss=True,
        per_device_train_batch_size=MICRO_BATCH,
        num_train_epochs=rounds,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,  # as often as ours
    )

    class Tell(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            done(state.global_step % (state.max_steps // rounds) == 0)

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    model, examples = LlamaForCausalLM.from_pretrained(folder / "model"), datasets.Dataset.from_list(rows)
    SFTTrainer(model, args=settings, train_dataset=examples, processing_class=tokenizer, callbacks=[Tell()]).train()


CANDIDATES: dict[str, Candidate] = {
    "llmft": llmft,
    "llmft --compile": lambda *given: llmft(*given, compiled=True),
    "bare, trained positions": lambda *given: bare_loop(*given, packed=True, loss=trained_logits),
    "bare, all logits": lambda *given: bare_loop(*given, packed=True, loss=all_logits),
    "TRL": trl,
    "seed": lambda *given: bare_loop(*given, packed=False, loss=seed_loss),
}


def measure(name: str, folder: Path, passes: int, threads: int) -> None:
    """In the candidate's own process: a step for every line of input, and its seconds as a line of output. Whatever
    comes before the first step counts as a part of it."""
    import torch

    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.stdin.readline()
    started, cpu = time.perf_counter(), time.process_time()

    def done(end: bool) -> None:
        nonlocal started, cpu
        took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
        print(json.dumps({**took, "end": end}), file=answers, flush=True)
        if not sys.stdin.readline():
            raise SystemExit  # the last pass is over
        started, cpu = time.perf_counter(), time.process_time()

    CANDIDATES[name](folder, passes, done)


class Candidates:
    """The processes, which compute one at a time."""

    def __init__(self, names: list[str], folder: Path, passes: int, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder), "--rounds", str(passes)]
        command += ["--threads", str(threads)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment |= {"OMP_NUM_THREADS": str(threads), "LLMFT_CACHE": str(folder / "cache")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.processes = {name: subprocess.Popen([*command, "--measure", name], **pipes) for name in names}

    def step(self, name: str) -> dict[str, Any]:
        """One optimizer step: its `seconds`, those of its threads (`cpu`), and whether a pass over the rows ends."""
        process = self.processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{name} failed")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def pass_over(self) -> dict[str, dict[str, float]]:
        """One pass over the rows by each, step by step in turns: its `seconds` and `cpu`."""
        found = {name: {"seconds": 0.0, "cpu": 0.0} for name in self.processes}
        under_way = list(self.processes)
        while under_way:
            for name in tuple(under_way):
                answer = self.step(name)
                for kind in found[name]:
                    found[name][kind] += answer[kind]
                if answer["end"]:
                    under_way.remove(name)
        return found

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument(
        "--rounds", type=int, default=5, help="passes over the rows that are counted, after a first one"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help=f"candidates, separated by semicolons: {'; '.join(CANDIDATES)}")
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.folder, given.rounds, given.threads)
        return
    wanted = [name.strip() for name in given.only.split(";")] if given.only else list(CANDIDATES)
    if unknown := set(wanted) - set(CANDIDATES):
        raise SystemExit(f"--only: no candidate {', '.join(sorted(unknown))}; there are {'; '.join(CANDIDATES)}")
    with tempfile.TemporaryDirectory(prefix="llmft-throughput-") as scratch:
        make(given.shared, Path(scratch), given.rows)
        tokens = int(prepared(Path(scratch)).train.lengths.sum())
        candidates = Candidates(wanted, Path(scratch), given.rounds + 1, given.threads)
        try:
            candidates.pass_over()  # loads, and makes buffers
            rounds = []
            for number in range(given.rounds):
                rounds.append(candidates.pass_over())
                print(f"round {number + 1}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
        finally:
            candidates.close()
    print(f"{given.rows} rows, {tokens} real tokens, {given.threads} threads, median of {given.rounds} rounds\n")
    show(rounds, tokens)


def show(rounds: list[dict[str, dict[str, float]]], tokens: int) -> None:
    """Medians, and how much faster llmft was in the same round."""
    print("| | real tokens/s | llmft is so many times as fast | by the clock of its threads |\n|---|---|---|---|")
    for name in rounds[0]:
        rates = [tokens / one[name]["seconds"] for one in rounds]
        ratios = []
        for kind in ("seconds", "cpu"):
            times = [one[name][kind] / one["llmft"][kind] for one in rounds if "llmft" in one]
            ratios.append(f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})" if times else "")
        print(
            f"| {name} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | {' | '.join(ratios)} |"
        )


if __name__ == "__main__":
    main()
