"""Training a Llama-2 7B on GPUs: tokens/s, MFU and peak memory of llmft, and of TRL's SFTTrainer with its settings.

    PYTHONPATH=.:plugins python benchmarks/gpu.py
    PYTHONPATH=.:plugins python benchmarks/gpu.py --tiny

One process a GPU, without Ray, storage or a download: a machine with torch, transformers, accelerate, DeepSpeed and
llmft's light dependencies is enough; peft for LoRA, TRL to compare with it. The weights are random, with the
architecture of Llama-2 7B, and so are the tokens; speed does not depend on what they say. It drives the loop, the
engine and the method that `llmft run` drives. --tiny does the same on the CPU with a model of two small layers: it
shows that the program runs, and measures nothing.

Four workloads: full fine-tuning and LoRA, each with rows of lengths like GSM8K's packed into contexts of 512, and with
rows of 4096 tokens. Two thirds of each row are trained. The candidates take turns, each in processes of its own; the
first steps are left out, and the median of the others is shown. `--candidates "llmft,llmft --compile"` shows what
compiled blocks gain; the seconds of compiling, before the first step, are not in it.

- Tokens/s: real tokens of all GPUs, without padding.
- MFU: model FLOPs utilisation by the formula of PaLM (Chowdhery et al. 2022, appendix B): tokens/s × (6 N + 12 L H Q T)
  over the peak of the GPUs for dense bf16. N: the parameters of all matrix products, so without the input embedding. L:
  layers; H Q: width of attention; T: tokens that a sample attends to, which is its own length and not that of the
  packed row. LoRA computes no gradients of the frozen weights: 4 N + 12 L H Q T. What is recomputed in a backward pass
  counts for nothing.
- Memory: the most that PyTorch's allocator had in use on one GPU; on the CPU, the process.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""Dense bf16 of NVIDIA's data sheets, by a part of the device's name; H100 is the SXM one."""

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
STRATEGIES = {"ddp": "ddp.Ddp", "zero-2": "zero.Zero2", "zero-3": "zero.Zero3"}
METHODS = {"full": "full.Full", "lora": "lora.Lora"}
WARM_UP = 3  # optimizer steps


def config_of(tiny: bool) -> Any:
    from transformers import LlamaConfig

    sizes, vocabulary, longest = (TINY, 512, 256) if tiny else (LLAMA_7B, 32000, 4096)
    return LlamaConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=longest, pad_token_id=0)


def table_of(given: argparse.Namespace) -> Any:
    """A token table with rows enough for all steps; packed: of lengths like GSM8K's (median 186, up to the context)."""
    import numpy as np

    random = np.random.default_rng(0)
    context, rows = given.context, given.steps * given.micro_batch * given.accumulation * given.gpus
    lengths = np.full(rows, context)
    if given.packed:
        several = rows * (1 + context // 100)  # shorter ones than any that are drawn on the average
        lengths = np.clip(random.lognormal(np.log(0.36 * context), 0.4, several), 8, context).astype(int)
    return made_table(lengths, random.integers(3, config_of(given.tiny).vocab_size, int(lengths.sum())))


def made_table(lengths: Any, ids: Any) -> Any:
    import numpy as np

    from llmft_core.data.tables import TokenTable

    class InMemory(TokenTable):
        """In place of one in the cache."""

        def __init__(self) -> None:
            self.ids = ids.astype(np.int32)
            self.offsets = np.concatenate([[0], np.cumsum(lengths)])
            within = np.arange(len(ids)) - np.repeat(self.offsets[:-1], lengths)
            self.trained = (3 * within >= np.repeat(lengths, lengths)).astype(np.uint8)
            self.lines = np.arange(1, len(lengths) + 1, dtype=np.int32)
            self.files = np.zeros(len(lengths), dtype=np.uint16)
            self.sources = ("table",)

    return InMemory()


def plan_of(given: argparse.Namespace, compiled: bool) -> Any:
    from llmft_core.plan import RunPlan

    return RunPlan.from_json(
        {
            "strategy": given.strategy,
            "method": given.method,
            "precision": given.precision,
            "global-batch": given.micro_batch * given.accumulation * given.gpus,
            "context-length": given.context,
            "max-steps": given.steps,
            "lr": 1e-5,
            "schedule": "constant",
            "data": {"packing": "best-fit" if given.packed else "none"},
            "gradient-checkpointing": given.gradient_checkpointing,
            "compile": compiled,
            "state": {"every-minutes": 0},
        }
    )


def plugin(kind: str, path: str, options: dict[str, Any]) -> Any:
    """Made of its class: entry points would need an installed llmft."""
    module, name = path.split(".")
    made = getattr(importlib.import_module(f"llmft_plugins.{kind}.{module}"), name)
    return made(made.options_type.model_validate(options))


def llmft(given: argparse.Namespace, rank: int, *, compiled: bool = False) -> dict[str, Any]:
    """Ours, on one rank: seconds of each optimizer step, and real tokens of them."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmft_core.data.order import Order
    from llmft_core.data.steps import epoch_steps
    from llmft_core.train.compiled import compile_blocks
    from llmft_core.train.job import Job
    from llmft_core.train.loop import train
    from llmft_core.train.model import make_trainable
    from llmft_core.train.optimizer import optimizer_maker
    from llmft_core.values import Placement, Setting

    plan, table, device = plan_of(given, compiled), table_of(given), "cpu" if given.tiny else "cuda"
    placement = Placement(given.gpus, device, given.precision, given.micro_batch, given.accumulation, 1.0)
    epochs = epoch_steps(Order.of(table, plan), plan, placement, None)
    config = config_of(given.tiny)
    job = Job(plan, placement, given.steps, epochs, config.vocab_size, 0, (), {}, Path(), Path(), Path())
    strategy = plugin("strategies", STRATEGIES[given.strategy], {})
    method = plugin("methods", METHODS[given.method], lora_options(given) if given.method == "lora" else {})
    engine = strategy.engine(placement, rank)
    setting = Setting(placement, strategy.partitions_weights, (), plan.seed, "random weights")
    loading = {} if setting.partitioned else method.loading(setting)
    torch.manual_seed(0)
    with engine.building(), torch.device("cpu" if given.tiny else f"cuda:{torch.cuda.current_device()}"):
        model = AutoModelForCausalLM.from_config(config, **{"dtype": engine.parameter_dtype, **loading})
    make_trainable(model, job)
    model = method.apply(model, setting)
    if compiled:
        compile_blocks(model, plan)
    engine.prepare(model, optimizer_maker(plan))
    steps: list[dict[str, float]] = []

    def hear(event: dict[str, Any]) -> None:
        if event["kind"] == "metrics":
            steps.append(event["metrics"])
        else:
            print(event.get("text"), file=sys.stderr, flush=True)

    report = SimpleNamespace(splits={"train": SimpleNamespace(weights=(1.0,))})
    data = SimpleNamespace(train=table, test=None, report=report)
    train(job, engine, data, rank, SimpleNamespace(send=hear), lambda *_: None)  # type: ignore[arg-type]
    engine.finish()
    seconds = [step["train/step_seconds"] for step in steps]
    tokens = [step["train/tokens_per_second"] * step["train/step_seconds"] for step in steps]
    return {"seconds": seconds, "tokens": tokens}


def lora_options(given: argparse.Namespace) -> dict[str, Any]:
    return {"rank": given.lora_rank, "alpha": 2.0 * given.lora_rank}


def trl(given: argparse.Namespace, rank: int) -> dict[str, Any]:
    """SFTTrainer, on one rank, with the same rows, strategy, precision and sizes."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from llmft_core.values import Placement

    datasets.disable_progress_bars()
    table, device = table_of(given), "cpu" if given.tiny else "cuda"
    placement = Placement(given.gpus, device, given.precision, given.micro_batch, given.accumulation, 1.0)
    deepspeed = plugin("strategies", STRATEGIES[given.strategy], {}).configuration(placement) or None
    rows = []
    for number in range(len(table)):
        there = slice(table.offsets[number], table.offsets[number + 1])
        mask = table.trained[there].astype(int).tolist()
        rows.append({"input_ids": table.ids[there].tolist(), "completion_mask": mask})
    flash = importlib.util.find_spec("flash_attn") is not None and given.precision != "fp32"
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            max_length=given.context,
            packing=given.packed,
            completion_only_loss=True,
            per_device_train_batch_size=given.micro_batch,
            gradient_accumulation_steps=given.accumulation,
            max_steps=given.steps,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            gradient_checkpointing=given.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=given.precision == "bf16",
            use_cpu=given.tiny,
            deepspeed=deepspeed,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        kept = torch.float32 if given.strategy == "ddp" or given.precision == "fp32" else torch.bfloat16
        kept = torch.bfloat16 if given.method == "lora" and given.precision == "bf16" else kept
        attention = {"attn_implementation": "flash_attention_2"} if flash else {}
        model = AutoModelForCausalLM.from_config(config_of(given.tiny), dtype=kept, **attention)
        adapter = None
        if given.method == "lora":
            from peft import LoraConfig

            adapter = LoraConfig(
                r=given.lora_rank, lora_alpha=2 * given.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        ends: list[float] = []

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if not ends:
                    ends.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                if not given.tiny:
                    torch.cuda.synchronize()
                ends.append(time.perf_counter())

        trainer = SFTTrainer(
            model,
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=no_words(), eos_token="</s>", pad_token="</s>"),
            peft_config=adapter,
            callbacks=[Clock()],
        )
        seen = [len(row["input_ids"]) for row in trainer.train_dataset]  # of the packed rows
        trainer.train()
    mean = statistics.mean(seen) * given.micro_batch * given.accumulation * given.gpus
    seconds = [after - before for before, after in pairwise(ends)]
    return {"seconds": seconds, "tokens": [mean] * len(seconds)}


def no_words() -> Any:
    """TRL wants a tokenizer, though its rows are ids."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>"))


CANDIDATES: dict[str, Callable[[argparse.Namespace, int], dict[str, Any]]] = {
    "llmft": llmft,
    "llmft --compile": lambda given, rank: llmft(given, rank, compiled=True),
    "TRL": trl,
}


def measure(given: argparse.Namespace) -> None:
    """One rank of one candidate; rank 0 prints what it found as JSON."""
    import torch
    import torch.distributed as dist

    from llmft_core.train.process_group import end_process_groups

    rank = int(os.environ["RANK"])
    if given.tiny:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if given.tiny else "cpu:gloo,cuda:nccl")
    answers, sys.stdout = sys.stdout, sys.stderr
    found = CANDIDATES[given.measure](given, rank)
    peak = process_peak() if given.tiny else torch.cuda.max_memory_allocated()
    peaks: list[int] = [0] * given.gpus
    dist.all_gather_object(peaks, peak)
    name = "CPU" if given.tiny else torch.cuda.get_device_name()
    if rank == 0:
        print(json.dumps({**found, "peak": max(peaks), "device": name}), file=answers, flush=True)
    end_process_groups()


def process_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops_per_token(config: Any, lengths: Any, method: str) -> float:
    """By PaLM's formula, see above; `lengths` (samples,) in tokens."""
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    keys = config.num_key_value_heads * (hidden // config.num_attention_heads)
    matrices = layers * (2 * hidden**2 + 2 * hidden * keys + 3 * hidden * config.intermediate_size)
    attended = float((lengths.astype(float) ** 2).sum() / lengths.sum())  # tokens, as a mean over tokens
    return (4 if method == "lora" else 6) * (matrices + vocabulary * hidden) + 12 * layers * hidden * attended


def run(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One candidate in processes of its own, one a GPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, "--workload", json.dumps(vars(given))]
    processes = []
    for rank in range(given.gpus):
        layout = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": given.gpus, "LOCAL_WORLD_SIZE": given.gpus}
        layout |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        device = {"ACCELERATE_TORCH_DEVICE": "cpu" if given.tiny else f"cuda:{rank}"} if name != "TRL" else {}
        environment = {**os.environ, **{key: str(value) for key, value in layout.items()}, **device}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        return {"failed": True}
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


def shown(name: str, given: argparse.Namespace, found: dict[str, Any], peak_tflops: float | None) -> str:
    """A line of the table."""
    work = f"{given.method}, {given.context}{' packed' if given.packed else ''}"
    if "failed" in found:
        return f"| {work} | {name} | failed: see its error above | | | |"
    kept = range(WARM_UP, len(found["seconds"]))
    rate = statistics.median(found["tokens"][step] / found["seconds"][step] for step in kept)
    known = peak_tflops or next((peak for part, peak in PEAK_TFLOPS.items() if part in found["device"]), None)
    per_token = flops_per_token(config_of(given.tiny), table_of(given).lengths, given.method)
    use = f"{rate * per_token / (known * 1e12 * given.gpus):.1%}" if known else "peak unknown: --peak-tflops"
    size = f"{given.micro_batch} × {given.accumulation}{', recomputing' if given.gradient_checkpointing else ''}"
    return f"| {work} | {name} | {size} | {rate:,.0f} | {use} | {found['peak'] / 2**30:.1f} GiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with a model of two small layers")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--strategy", choices=list(STRATEGIES), help="default: zero-2; ddp on the CPU and for LoRA")
    parser.add_argument("--methods", default="full,lora")
    parser.add_argument("--contexts", default="512,4096", help="512 and shorter are packed")
    parser.add_argument("--candidates", default="llmft,TRL", help=f"of {', '.join(CANDIDATES)}; default: llmft,TRL")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a GPU in an optimizer step")
    parser.add_argument(
        "--steps", type=int, default=13, help=f"optimizer steps, of which the first {WARM_UP} are left out"
    )
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--no-recompute", action="store_true", help="no gradient checkpointing: faster, where it fits")
    parser.add_argument("--peak-tflops", type=float, help="of one GPU, dense bf16; default: by its name")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(argparse.Namespace(**json.loads(given.workload), measure=given.measure))
        return
    if given.steps <= WARM_UP:
        raise SystemExit(f"--steps {given.steps}: the first {WARM_UP} are left out: give at least {WARM_UP + 1}")
    if "llmft --compile" in given.candidates.split(",") and given.strategy == "zero-3":
        raise SystemExit("--candidates: llmft refuses --compile with zero-3")
    names, missing = [name for name in CANDIDATES if name in given.candidates.split(",")], []
    if "TRL" in names and importlib.util.find_spec("trl") is None:
        names.remove("TRL")
        missing.append("TRL is not installed: it was left out")
    lines = []
    for method in given.methods.split(","):
        for context in map(int, given.contexts.split(",")):
            work = argparse.Namespace(
                tiny=given.tiny,
                gpus=given.gpus,
                strategy=given.strategy or ("ddp" if given.tiny or method == "lora" else "zero-2"),
                method=method,
                precision="fp32" if given.tiny else "bf16",
                context=context,
                packed=context <= 512,
                micro_batch=max(1, given.tokens // context),
                accumulation=given.accumulation,
                steps=given.steps,
                lora_rank=given.lora_rank,
                gradient_checkpointing=not given.no_recompute,
            )
            for name in names:
                lines.append(shown(name, work, run(name, work), given.peak_tflops))
                print(lines[-1], file=sys.stderr, flush=True)
    print("| workload | | rows × micro-batches | tokens/s | MFU | peak memory |\n|---|---|---|---|---|---|")
    print("\n".join([*lines, *(f"\n{line}" for line in missing)]))


if __name__ == "__main__":
    main()
