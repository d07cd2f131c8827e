"""What the contract of strategies asks of their engines, in real processes of one gloo group."""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {"vocab_size": 13, "hidden_size": 6, "intermediate_size": 7, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 8}


def check_filling(strategy: type[Any], options: Any, placement: Any) -> None:
    """Fill a tiny Llama whose parameters hold their own element numbers, and look at what each parameter then is.

    Raises AssertionError with what a rank found.
    """
    _on_ranks(_fill_and_look, strategy, options, placement)


def check_refusals(strategy: type[Any], options: Any, placement: Any) -> None:
    """Train a tiny Llama with steps among them whose loss or gradient is not finite on the last rank alone: nothing
    changes in such a step on any rank, and what follows is as if it had never been. Raises AssertionError.
    """
    _on_ranks(_refuse_and_look, strategy, options, placement)


Look = Callable[[Callable[[], Any], int, Any, Path], None]
"""(what makes an engine, rank, placement, a folder that all ranks share)"""


def _on_ranks(look: Look, strategy: type[Any], options: Any, placement: Any) -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_on_rank, args=(rank, Path(folder), look, strategy, options, placement))
            for rank in range(placement.world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        for rank, process in enumerate(processes):
            if process.is_alive():
                process.kill()
            said = Path(folder) / f"rank-{rank}"
            assert said.is_file(), f"rank {rank} ended with exit code {process.exitcode} and said nothing"
            assert said.read_text() == "", said.read_text()


def _on_rank(rank: int, folder: Path, look: Look, strategy: type[Any], options: Any, placement: Any) -> None:
    import traceback

    import torch.distributed as dist

    from llmft_core.train.process_group import end_process_groups

    size = placement.world_size
    os.environ.update(
        {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": f"{size}"},
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
    )
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
        look(lambda: strategy(options).engine(placement, rank), rank, placement, folder)
        dist.barrier()
        end_process_groups()
        (folder / f"rank-{rank}").write_text("")
    except BaseException:  # noqa: BLE001 - shipped to the parent, which raises
        (folder / f"rank-{rank}").write_text(traceback.format_exc())


def _fill_and_look(make: Callable[[], Any], rank: int, placement: Any, _: Path) -> None:
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmft_core.train.sliced import make_empty

    engine = make()
    config = LlamaConfig(**SIZES, dtype=engine.parameter_dtype)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    fill = engine.filler()
    if fill is None:  # then the core hands building to transformers
        with engine.building():
            whole = LlamaForCausalLM(config)
        assert {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()} == shapes
        engine.finish()
        return
    model = make_empty(skeleton, engine)
    for name, parameter in model.named_parameters():
        asked: list[tuple[int, int]] = []

        def read(start: int, into: torch.Tensor, asked: list[tuple[int, int]] = asked) -> None:
            assert into.ndim == 1
            into.copy_(torch.arange(start, start + len(into)))
            asked.append((start, start + len(into)))

        with torch.no_grad():
            fill(parameter, read)
        count = math.prod(shapes[name])
        everyone: list[Any] = [None] * placement.world_size
        dist.all_gather_object(everyone, asked)
        read_at_all = {number for ranges in everyone for start, stop in ranges for number in range(start, stop)}
        assert read_at_all == set(range(count)), f"{name} ({count} elements): the ranks asked for {everyone}"
        with engine.whole([parameter]):
            found = parameter.detach().cpu().float().clone()
        expected = torch.arange(count, dtype=torch.float32).view(shapes[name])
        assert torch.equal(found, expected), f"{name} on rank {rank}: {found} instead of {expected}"
    engine.finish()


def _refuse_and_look(make: Callable[[], Any], rank: int, placement: Any, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    if rank == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "model")
    dist.barrier()
    finite = _steps(make, rank, placement, folder / "model", ["", ""])
    for course in (["loss", "", "gradient", ""], ["gradient", "", "loss", ""]):
        found = _steps(make, rank, placement, folder / "model", course)
        assert found[1] == finite[1], f"after {course}: counters are {found[1]}, not {finite[1]}"
        assert found[0].keys() == finite[0].keys() != set()
        for key, values in finite[0].items():
            assert torch.equal(found[0][key], values), f"{key} is not what it is without the refused steps of {course}"


def _steps(
    make: Callable[[], Any], rank: int, placement: Any, model: Path, course: list[str]
) -> tuple[dict[Any, Any], Any]:
    """Steps, each with what is not finite in it (`loss`, `gradient` or nothing); what is held afterwards."""
    import torch

    from llmft_core.plan import RunPlan
    from llmft_core.train.job import Job
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    plan = RunPlan.from_json({"lr": 1e-2, "weight-decay": 0.1, "precision": placement.precision})
    job = Job(plan, placement, 1, (1,), SIZES["vocab_size"], 0, (), {}, model, Path(), Path())
    engine = make()
    engine.prepare(build_model(job, engine), optimizer_maker(plan))
    numbers = iter(range(len(course)))  # of the finite steps
    for wrong in course:
        number = 99 if wrong else next(numbers)
        before = _held(engine)
        engine.set_learning_rate(0.01 + 0.001 * number)
        for micro_batch in range(placement.accumulation):
            share = _share(engine.model, [number, micro_batch, rank])
            if wrong and rank == placement.world_size - 1 and micro_batch == 0:
                # The root of 0 is 0, and its slope is not finite.
                share = share * math.inf if wrong == "loss" else share + torch.sqrt(share * 0)
            engine.backward(share, last=micro_batch == placement.accumulation - 1)
        outcome = engine.step()
        assert outcome.applied is not bool(wrong), f"a step with {wrong or 'nothing'} not finite: {outcome}"
        assert math.isfinite(outcome.grad_norm) is not bool(wrong), outcome
        if wrong:
            after = _held(engine)
            assert before.keys() == after.keys()
            for key, values in before.items():
                assert torch.equal(after[key], values), f"{key} changed in a step that was refused"
    held, counters = _held(engine), engine.counters()
    engine.finish()
    return held, counters


def _share(model: Any, seed: list[int]) -> Any:
    """The loss of a micro-batch made of a seed, 0-d float32."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (2, 8)))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _held(engine: Any) -> dict[Any, Any]:
    """Copies of this rank's fragments by (name, kind, start), and of the weights that it computes with."""
    import torch

    held: dict[Any, Any] = {
        (name, kind, start): values.detach().clone() for name, kind, start, values in engine.fragments()
    }
    held.update(engine.gathered(list(engine.shapes()), torch.float32))
    return held
