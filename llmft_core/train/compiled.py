"""`--compile`: the repeated blocks of a model go through graphs that torch.compile makes once, for all blocks alike.

What is around the blocks stays as it is: embeddings, masks, the output layer and its loss, the strategy's wrapper.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from llmft_core.data.batches import SHORTEST, Form
from llmft_core.errors import LlmftError, one_line
from llmft_core.extensions import Engine
from llmft_core.plan import RunPlan
from llmft_core.train.job import Job
from llmft_core.train.joined_rows import joins_rows
from llmft_core.train.output_layer import layer_of

MOST_GRAPHS = 32
"""Graphs of all blocks, at most: with gradients and without, with a mask and without, of each kind of block. Were there
more, then each batch would make its own, and PyTorch would go on without a graph; of whole graphs it is an error."""

REASON_LENGTH = 300  # characters


def compile_blocks(model: torch.nn.Module, plan: RunPlan) -> None:
    """In place, and once only: names of parameters stay as they are. Nothing is computed before the first call.

    Raises LlmftError where the model does not say what its blocks are.
    """
    import torch._dynamo
    import torch._inductor
    import torch.fx.experimental._config as shapes

    blocks = blocks_of(model)
    if not blocks:
        raise LlmftError(
            f"{type(model).__name__} does not name its repeated blocks (_no_split_modules), which is what --compile "
            "compiles: leave it out"
        )
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.optimize_ddp = False  # it would cut a block's graph, of which the gradients come soon enough
    shapes.use_duck_shape = False  # a width that happens to be another size too is still a width
    if plan.deterministic:
        torch._inductor.config.deterministic = True  # no kernel is chosen by a race
    for block in blocks:
        block.compile(fullgraph=True, dynamic=True)  # what does not fit into one graph is an error


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Those that transformers would never split over devices, as far as they are in lists."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return [block for each in lists for block in each if type(block).__name__ in names]


def uncompiled(compiled: bool) -> AbstractContextManager[object]:
    """A context in which blocks that are compiled compute as if they were not."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def graphs() -> int:
    """Graphs that this process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compile_ahead(job: Job, engine: Engine, device: torch.device) -> str:
    """Compile before the first step, on rows of the context's length; says what was done. Not collective.

    Kernels may be cut for the sizes that a graph saw first: were these sizes of some batch, then a run that goes on
    with another batch might compute other bits. No weight changes, and no gradient is kept.
    """
    started, before = time.monotonic(), graphs()
    plan, model, blocks = job.plan, engine.bare_model, blocks_of(engine.bare_model)
    form, context = Form.of(plan, job.pad_id), job.plan.context_length
    evaluated = plan.eval_micro_batch or job.placement.micro_batch
    # PyTorch's cache on disk has one entry for all sizes, whatever sizes its kernels were cut for.
    sizes = (job.placement.micro_batch, evaluated, context, torch.get_num_threads())
    torch.compiler.config.cache_key_tag = f"llmft {' '.join(map(str, sizes))}"
    trained = [next((p for p in block.parameters() if p.requires_grad), None) for block in blocks]
    ends = [parameter for parameter in trained if parameter is not None]  # a backward pass gets to them through blocks
    for training in (True, False):
        engine.model.train(training)
        rows = job.placement.micro_batch if training else evaluated
        for width in (context, max(SHORTEST, context - 1)):  # what depends on divisors of a width shows now
            for samples in (1, 2) if form.packed else (1,):  # in a row: one needs no mask
                with torch.set_grad_enabled(training), one_position(model):
                    score = model(**inputs_of(model, rows, width, samples, form, device)).logits.float().sum()
                if training and ends:
                    torch.autograd.grad(score, ends, allow_unused=True)
    engine.model.train()
    return f"{len(blocks)} blocks share {graphs() - before} graphs, compiled in {time.monotonic() - started:.0f} s"


def inputs_of(
    model: torch.nn.Module, rows: int, width: int, samples: int, form: Form, device: torch.device
) -> dict[str, object]:
    """What a model is called with for a micro-batch of `rows` such rows."""
    shape = (1, -1) if form.packed and joins_rows(model) else (rows, width)
    inputs: dict[str, object] = {"input_ids": torch.full((rows, width), form.pad_id).view(shape), "use_cache": False}
    if form.packed:
        positions = torch.arange(width) % -(-width // samples)  # (T,)
        inputs["position_ids"] = positions.repeat(rows, 1).view(shape)
    return {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}


@contextmanager
def one_position(model: torch.nn.Module) -> Iterator[None]:
    """A context in which the output layer sees one position of each row: all logits might not fit into memory."""
    layer = layer_of(model)
    if layer is None:
        yield
        return
    hook = layer.register_forward_pre_hook(lambda _, given: (given[0][:, :1], *given[1:]) if given else None)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def compiler_errors(compiled: bool) -> Iterator[None]:
    """A context in which what the compiler cannot do is an LlmftError."""
    if not compiled:
        yield
        return
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        cause = error.__cause__ if isinstance(error, FailOnRecompileLimitHit) else None
        reason = one_line(cause or error)[:REASON_LENGTH]
        raise LlmftError(
            f"torch.compile failed ({type(error).__name__}: {reason}): leave out --compile; a run that has a state may "
            "go on without it"
        ) from error
