"""What the contract of strategies asks of their engines, in real processes of one gloo group."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

SIZES = {"vocab_size": 13, "hidden_size": 6, "intermediate_size": 7, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 8}


def check_filling(strategy: type[Any], options: Any, placement: Any) -> None:
    """Fill a tiny Llama whose parameters hold their own element numbers, and look at what each parameter then is.

    Raises AssertionError with what a rank found.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_on_rank, args=(rank, Path(folder), strategy, options, placement))
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


def _on_rank(rank: int, folder: Path, strategy: type[Any], options: Any, placement: Any) -> None:
    import traceback

    import torch.distributed as dist

    size = placement.world_size
    os.environ.update(
        {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": f"{size}"},
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
    )
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
        engine = strategy(options).engine(placement, rank)
        _fill_and_look(engine, rank, size)
        engine.finish()
        dist.barrier()
        dist.destroy_process_group()
        (folder / f"rank-{rank}").write_text("")
    except BaseException:  # noqa: BLE001 - shipped to the parent, which raises
        (folder / f"rank-{rank}").write_text(traceback.format_exc())


def _fill_and_look(engine: Any, rank: int, size: int) -> None:
    import math

    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmft_core.train.sliced import make_empty

    config = LlamaConfig(**SIZES, dtype=engine.parameter_dtype)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    fill = engine.filler()
    if fill is None:  # then the core hands building to transformers
        with engine.building():
            whole = LlamaForCausalLM(config)
        assert {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()} == shapes
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
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, asked)
        read_at_all = {number for ranges in everyone for start, stop in ranges for number in range(start, stop)}
        assert read_at_all == set(range(count)), f"{name} ({count} elements): the ranks asked for {everyone}"
        with engine.whole([parameter]):
            found = parameter.detach().cpu().float().clone()
        expected = torch.arange(count, dtype=torch.float32).view(shapes[name])
        assert torch.equal(found, expected), f"{name} on rank {rank}: {found} instead of {expected}"
