"""One GPU through the real command: every strategy and precision, and a checkpoint that runs there without llmft."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TIMEOUT_SECONDS, llmft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]

ROWS = ("--dataset.rows", "64", "--dataset.test-rows", "16", "--epochs", "2")
BATCH = ("--global-batch", "16", "--micro-batch", "4")  # 8 optimizer steps of 4 micro-batches
BF16 = 2e-2  # nats by which losses of bf16 runs may differ: DDP keeps fp32 weights, ZeRO bf16 ones with fp32 masters

GENERATE = """
import sys
sys.modules["llmft_core"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).to("cuda")
chat = [{"role": "user", "content": "How many?"}]
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to("cuda")
assert torch.isfinite(model(ids).logits).all()
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
print(model.dtype, model.device)
"""

OVERFLOW = """
import os
import torch
import torch.distributed as dist
from llmft_core.catalog import Catalog
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.train.optimizer import optimizer_maker
from llmft_core.values import Placement
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
engine = Catalog(load_plugins()).create("strategy", {"name": "ddp"}).engine(Placement(1, "cuda", "fp16", 1, 1, 1.0), 0)
model = torch.nn.Linear(2, 1)
engine.prepare(model, optimizer_maker(RunPlan.from_json({"precision": "fp16", "lr": 0.1})))
for factor in (float("inf"), 1.0):
    before = model.weight.detach().clone()
    engine.backward(engine.model(torch.ones(1, 2, device="cuda")).sum() * factor, last=True)
    outcome = engine.step()
    print("says", outcome.applied, "did", not torch.equal(before, model.weight))
engine.finish()
dist.destroy_process_group()
"""

UNSEEN = """
import os
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from llmft_core.catalog import Catalog
from llmft_core.data.batches import MicroBatch
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.train.guards import with_its_gradient
from llmft_core.train.job import Job
from llmft_core.train.loss import Call, micro_batch_loss
from llmft_core.train.optimizer import optimizer_maker
from llmft_core.train.output_probe import find_output_layer
from llmft_core.values import Placement
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
device, placement, plan = torch.device("cuda", 0), Placement(1, "cuda", "bf16", 2, 4, 1.0), RunPlan.from_json({})
engine = Catalog(load_plugins()).create("strategy", {"name": "ddp"}).engine(placement, 0)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
engine.prepare(LlamaForCausalLM(LlamaConfig(**sizes)).train(), optimizer_maker(plan))
job = Job(plan, placement, 1, (1,), 128, 0, (), {}, Path(), Path(), Path())
output, _ = find_output_layer(job, engine, device)
call = Call.of(output, engine.bare_model)
ids = np.arange(2 * 64).reshape(2, 64) % 128
within = np.arange(64) % 32  # packed: two samples a row
labels = np.where(within < 8, -100, ids)
positions = np.broadcast_to(within, ids.shape).copy()
def step(positions):
    shares = []
    for number in range(4):
        share = micro_batch_loss(engine.model, MicroBatch(ids, labels, positions, number), device, call) / 1000
        engine.backward(with_its_gradient(share), last=number == 3)
        shares.append(share.detach())
    return shares
for kind, given in (("padded", None), ("packed", positions)):
    step(given)  # what is set up once may wait
    engine.step()
    torch.cuda.set_sync_debug_mode("error")
    shares = step(given)
    try:
        float(shares[0])
        print(kind, "a read goes unnoticed")
    except RuntimeError:
        print(kind, "a read is refused")
    torch.cuda.set_sync_debug_mode("default")
    print(kind, engine.step().applied, all(torch.isfinite(share) for share in shares))
engine.finish()
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Run:
    """What a run left behind: the metrics of every optimizer step, and its last checkpoint."""

    metrics: list[dict[str, Any]]
    checkpoint: Path

    @property
    def losses(self) -> list[float]:
        """Nats per trained token, one a step."""
        return [row["train/loss"] for row in self.metrics]

    @property
    def peak(self) -> float:
        """Bytes of the GPU's allocator at most."""
        return max(row["train/peak_memory_bytes"] for row in self.metrics)


def run(folder: Path, *flags: str) -> Run:
    """`llmft run` with flags, 8 optimizer steps, on the GPU; checks what is true of every run."""
    answer = llmft("run", *ROWS, *flags, "--name", "r", folder=folder)
    assert answer.code == 0, answer.err
    written = folder / "llmft-runs" / "runs" / "r"
    assert json.loads((written / "plan.json").read_text())["placement"]["device"] == "cuda"
    done = Run(
        [json.loads(line) for line in (written / "metrics.jsonl").read_text().splitlines()],
        max(written.glob("checkpoint_*")),
    )
    assert len(done.metrics) == 8
    assert done.peak > 0
    assert all(math.isfinite(loss) for loss in done.losses)
    assert math.isfinite(done.metrics[-1]["eval/loss"])
    assert done.losses[-1] < done.losses[0] - 0.2
    assert (done.checkpoint / ".is_checkpoint").is_file()
    return done


def python(program: str, *arguments: str) -> list[str]:
    """The lines that a program prints in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A strategy's bf16 run with one worker on Ray; each is made once."""
    made: dict[str, Run] = {}

    def of(strategy: str) -> Run:
        if strategy not in made:
            flags = (*BATCH, "--workers", "1", "--strategy", strategy, "--precision", "bf16")
            made[strategy] = run(tmp_path_factory.mktemp(strategy), *flags)
        return made[strategy]

    return of


@pytest.mark.parametrize("strategy", ["ddp", "zero-2", "zero-3"])
def test_bf16_trains_and_its_checkpoint_runs_on_the_gpu(strategy: str, bf16: Callable[[str], Run]) -> None:
    done = bf16(strategy)
    assert not any(row["train/skipped"] for row in done.metrics)
    assert python(GENERATE, str(done.checkpoint))[-1] == "torch.bfloat16 cuda:0"


@pytest.mark.parametrize("strategy", ["zero-2", "zero-3"])
def test_bf16_losses_agree_between_strategies(strategy: str, bf16: Callable[[str], Run]) -> None:
    one, other = bf16("ddp"), bf16(strategy)
    assert other.losses == pytest.approx(one.losses, abs=BF16)
    assert other.metrics[-1]["eval/loss"] == pytest.approx(one.metrics[-1]["eval/loss"], abs=BF16)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("strategy", "offload"),
    [
        ("zero-2", ("--strategy.offload-optimizer", "cpu")),
        ("zero-3", ("--strategy.offload-optimizer", "cpu")),
        ("zero-3", ("--strategy.offload-params", "cpu")),
        ("zero-3", ("--strategy.offload", "all")),
    ],
)
def test_offloading_frees_the_gpu_and_changes_nothing(
    strategy: str, offload: tuple[str, str], precision: str, bf16: Callable[[str], Run], tmp_path: Path
) -> None:
    flags = (*BATCH, "--workers", "1", "--strategy", strategy, *offload, "--precision", precision)
    done = run(tmp_path, *flags)
    assert done.losses[0] == pytest.approx(bf16("ddp").losses[0], abs=BF16)
    if precision == "bf16":
        assert done.losses == pytest.approx(bf16(strategy).losses, abs=BF16)
        assert done.peak < bf16(strategy).peak
    resumed = llmft("verify-resume", *ROWS, *flags, "--deterministic", folder=tmp_path)
    assert resumed.code == 0, resumed.err


@pytest.mark.parametrize("strategy", ["ddp", "zero-3"])
def test_in_this_process_it_is_the_same_training(strategy: str, bf16: Callable[[str], Run], tmp_path: Path) -> None:
    """`--workers 0`: no Ray, and its own process group."""
    done = run(tmp_path, *BATCH, "--workers", "0", "--strategy", strategy, "--precision", "bf16")
    assert done.losses == pytest.approx(bf16(strategy).losses, abs=BF16)


@pytest.mark.parametrize("strategy", ["ddp", "zero-2"])
def test_fp16_with_loss_scaling(strategy: str, bf16: Callable[[str], Run], tmp_path: Path) -> None:
    """Steps may be skipped while the scale settles; a step is skipped exactly where the norm is not finite."""
    done = run(tmp_path, *BATCH, "--workers", "1", "--strategy", strategy, "--precision", "fp16")
    skipped = [bool(row["train/skipped"]) for row in done.metrics]
    assert skipped == [row["train/grad_norm"] is None for row in done.metrics]  # JSON has no infinity: None
    assert sum(skipped) < len(skipped) // 2
    assert done.losses[0] == pytest.approx(bf16("ddp").losses[0], abs=BF16)
    assert python(GENERATE, str(done.checkpoint))[-1] == "torch.float16 cuda:0"


def test_fp16_says_when_a_step_was_skipped() -> None:
    """A fused AdamW would skip inside its kernel, where accelerate does not see it."""
    assert python(OVERFLOW)[-2:] == ["says False did False", "says True did True"]


def test_the_host_waits_for_no_micro_batch() -> None:
    """PyTorch raises an error where it would wait for the GPU: a number read back, a copy to the host."""
    assert python(UNSEEN)[-4:] == [
        "padded a read is refused",
        "padded True True",
        "packed a read is refused",
        "packed True True",
    ]


@pytest.mark.parametrize("strategy", ["ddp", "zero-3"])
def test_gradient_checkpointing_saves_memory_and_changes_nothing(strategy: str, tmp_path: Path) -> None:
    flags = ("--global-batch", "16", "--micro-batch", "16", "--workers", "1", "--strategy", strategy)
    runs = []
    for extra in ((), ("--gradient-checkpointing",)):
        folder = tmp_path / f"{len(extra)}"
        folder.mkdir()
        runs.append(run(folder, *flags, "--precision", "bf16", *extra))
    plain, checkpointed = runs
    assert checkpointed.losses == pytest.approx(plain.losses, abs=BF16)
    assert checkpointed.peak < plain.peak


@pytest.mark.parametrize("strategy", ["ddp", "zero-2", "zero-3"])
def test_an_adapter_takes_less_memory_and_runs_merged(
    strategy: str, bf16: Callable[[str], Run], tmp_path: Path
) -> None:
    flags = (*BATCH, "--workers", "1", "--strategy", strategy, "--precision", "bf16", "--method", "lora")
    done = run(tmp_path, *flags)
    assert done.losses[0] == pytest.approx(bf16(strategy).losses[0], abs=BF16)
    assert done.peak < bf16(strategy).peak
    merged = llmft("checkpoint", "merge", str(done.checkpoint), "--out", "whole", folder=tmp_path)
    assert merged.code == 0, merged.err
    assert python(GENERATE, str(tmp_path / "whole"))[-1] == "torch.bfloat16 cuda:0"


@pytest.mark.parametrize("strategy", ["ddp", "zero-2"])
def test_an_adapter_on_four_bits(strategy: str, tmp_path: Path) -> None:
    """What 4 bits lose is little beside what random weights do not know."""
    pytest.importorskip("bitsandbytes")
    flags = (*BATCH, "--workers", "1", "--strategy", strategy, "--precision", "bf16", "--method", "lora")
    done = run(tmp_path, *flags, "--method.quantize", "nf4")
    merged = llmft("checkpoint", "merge", str(done.checkpoint), "--out", "whole", folder=tmp_path)
    assert merged.code == 0, merged.err
