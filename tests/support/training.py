"""What a rank does in tests of training; here, because a spawned process has to import it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tables import InMemory, ListTable, random_table

from llmft_core.data.order import Order
from llmft_core.data.steps import epoch_steps
from llmft_core.plan import RunPlan
from llmft_core.train.job import Job
from llmft_core.values import Placement

STEPS = 5
TRAIN = random_table(14, 101, 20)  # no multiple of the global batch: the tail is trained with its true weight


class Recorder:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def send(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def warn(self, text: str) -> None:
        self.send({"kind": "warning", "text": text})


def job_for(strategy: str, folder: Path, world_size: int, micro_batch: int, accumulation: int, **settings: Any) -> Any:

    precision = settings.pop("precision", "fp32")
    plan = RunPlan.from_json(
        {
            "strategy": strategy,
            "lr": 1e-2,
            "weight-decay": 0.1,
            "warmup-steps": 2,
            "precision": precision,
            "global-batch": world_size * micro_batch * accumulation,
            "max-steps": STEPS,
            **settings,
        }
    )
    placement = Placement(world_size, "cpu", precision, micro_batch, accumulation, plan.max_grad_norm)
    steps = epoch_steps(Order.of(TRAIN, plan), plan, placement, None)
    return Job(plan, placement, STEPS, steps, 101, 0, (), {}, folder, Path(), Path())


def train_rank(rank: int, strategy: str, folder: str, layouts: list[tuple[int, int, int]], settings: dict) -> Any:
    """Train with the first layout of this world size; (losses, gradient norms, evaluation losses, weights)."""
    import torch

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.train.loop import train
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    data = InMemory(TRAIN, random_table(5, 101, 20, seed=1))

    catalog = Catalog(load_plugins())
    answers = []
    for world_size, micro_batch, accumulation in layouts:
        job = job_for(strategy, Path(folder), world_size, micro_batch, accumulation, **settings)
        engine = catalog.create("strategy", job.plan.strategy).engine(job.placement, rank)
        engine.prepare(build_model(job, engine), optimizer_maker(job.plan))
        recorder = Recorder()
        train(job, engine, data, rank, recorder, lambda step, epoch, metrics: None)  # type: ignore[arg-type]
        shapes = engine.shapes()
        weights = engine.gathered(list(shapes), torch.float32)
        engine.finish()
        found = [event["metrics"] for event in recorder.events]
        answers.append(
            {
                "loss": [m["train/loss"] for m in found],
                "norm": [m["train/grad_norm"] for m in found],
                "eval": [m["eval/loss"] for m in found if "eval/loss" in m],
                "weights": {name: tensor.numpy() for name, tensor in weights.items()},
                "shapes": shapes,
            }
        )
    return answers


def train_with_each(
    rank: int, strategies: tuple[str, ...], folder: str, layouts: list[tuple[int, int, int]], settings: dict
) -> dict[str, Any]:
    """`train_rank` by strategy, in one process."""
    return {strategy: train_rank(rank, strategy, folder, layouts, settings) for strategy in strategies}


VOCABULARY = 101


def prepared(job: Job, rank: int, catalog: Any) -> Any:
    """The engine of a rank with the job's model under its method, as `train_rank` makes it."""
    from llmft_core.train.compiled import compile_blocks
    from llmft_core.train.method import applied, setting_of
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    engine = catalog.create("strategy", job.plan.strategy).engine(job.placement, rank)
    setting = setting_of(job.plan, job.placement, (), catalog)
    model = applied(catalog.create("method", job.plan.method), build_model(job, engine), setting, engine)
    if job.plan.compile:
        compile_blocks(model, job.plan)
    engine.prepare(model, optimizer_maker(job.plan))
    return engine


def train_and_export(rank: int, strategy: str, base: str, target: str, dtype: str, precision: str) -> Any:
    """A few steps, then each rank writes its files into one folder; the gathered weights (rank 0), and what each rank
    wrote."""
    import torch

    from llmft_core.catalog import Catalog
    from llmft_core.checkpoint.export import WeightWriter, write_rest
    from llmft_core.checkpoint.snapshot import gather, lay_out
    from llmft_core.loading import load_plugins
    from llmft_core.train.loop import train
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    data = InMemory(random_table(8, VOCABULARY, 20))

    class Silent:
        def send(self, event: dict[str, Any]) -> None: ...

    placement = Placement(2, "cpu", precision, 2, 2, 1.0)  # type: ignore[arg-type]
    plan = RunPlan.from_json(
        {"strategy": strategy, "lr": 1e-2, "precision": precision, "global-batch": 8, "checkpoint": {"dtype": dtype}}
    )
    tokenizer = Path(base) / "tokenizer"
    job = Job(plan, placement, 2, (1, 1), VOCABULARY, 0, (), {}, Path(base), Path(), tokenizer)
    engine = Catalog(load_plugins()).create("strategy", {"name": strategy}).engine(placement, rank)
    engine.prepare(build_model(job, engine), optimizer_maker(plan))
    train(job, engine, data, rank, Silent(), lambda *_: None)  # type: ignore[arg-type]
    layout = lay_out(engine, plan, 2, max_shard=20_000)  # bytes: several files even of a tiny model
    tensors: dict[str, Any] = {}
    gather(engine, layout, rank, tensors.__setitem__)
    assert set(tensors) == {shard.file for shard in layout.shards if shard.writer == rank}
    writer = WeightWriter(layout, Path(base), Path(target))
    for file in tensors:
        writer.write(file, tensors[file])
    if rank == 0:
        write_rest(layout, tokenizer, (7,), Path(target))
    exported = writer.exported()
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    weights = engine.gathered(list(engine.shapes()), kept)
    engine.finish()
    return {name: tensor.float().numpy() for name, tensor in weights.items()}, exported, dict(layout.shapes)


def export_both_ways(rank: int, strategy: str, base: str, target: str, precision: str) -> dict[str, Any]:
    """A few steps, then the weights in files of several ranks, and all at once by accelerate, which this returns
    (on rank 0)."""
    from llmft_core.catalog import Catalog
    from llmft_core.checkpoint.export import WeightWriter
    from llmft_core.checkpoint.snapshot import gather, lay_out
    from llmft_core.loading import load_plugins
    from llmft_core.train.loop import train
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    job = job_for(strategy, Path(base), 2, 2, 2, precision=precision)
    engine: Any = Catalog(load_plugins()).create("strategy", {"name": strategy}).engine(job.placement, rank)
    engine.prepare(build_model(job, engine), optimizer_maker(job.plan))
    train(job, engine, InMemory(TRAIN), rank, Recorder(), lambda *_: None)  # type: ignore[arg-type]
    layout = lay_out(engine, job.plan, 2, max_shard=20_000)  # bytes: several files even of a tiny model
    writer = WeightWriter(layout, Path(base), Path(target))
    gather(engine, layout, rank, writer.write)
    if strategy == "zero-3":
        engine.model._config.zero_config.gather_16bit_weights_on_model_save = True
    whole = engine.accelerator.get_state_dict(engine.model)
    found = {name: tensor.detach().float().numpy().copy() for name, tensor in whole.items()} if rank == 0 else {}
    engine.finish()
    return found


def save_once(rank: int, base: str, store: str, room: bool) -> list[dict[str, Any]]:
    """One step and one checkpoint on each of two ranks, with or without room in memory for a copy; rank's events."""
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.train import saver as module
    from llmft_core.train.loop import train
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    data = InMemory(random_table(8, VOCABULARY, 20))

    module.has_room = lambda size: room
    plan = RunPlan.from_json({"strategy": "zero-3", "lr": 1e-2, "precision": "fp32", "global-batch": 8, "name": "x"})
    placement = Placement(2, "cpu", "fp32", 2, 2, 1.0)
    job = Job(plan, placement, 1, (1,), VOCABULARY, 0, (), {}, Path(base), Path(), Path(base) / "tokenizer")
    catalog = Catalog(load_plugins())
    engine = catalog.create("strategy", {"name": "zero-3"}).engine(placement, rank)
    engine.prepare(build_model(job, engine), optimizer_maker(plan))
    recorder = Recorder()
    with module.Saver(job, engine, rank, recorder, Places(catalog, None, {}).place(store)) as saver:
        train(job, engine, data, rank, saver, saver.save)  # type: ignore[arg-type]
    engine.finish()
    return recorder.events


def isolation(rank: int, strategy: str, folders: dict[str, str], compiled: bool = False) -> dict[str, str]:
    """What the probe before packed training says of each model; nothing where it lets the training begin."""
    import torch
    import torch.distributed as dist

    from llmft_core.catalog import Catalog
    from llmft_core.errors import LlmftError
    from llmft_core.loading import load_plugins
    from llmft_core.train.compiled import compile_blocks
    from llmft_core.train.isolation import check_isolation
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker

    catalog, answers = Catalog(load_plugins()), {}
    for kind, folder in folders.items():
        settings = {"context-length": 20, "data": {"packing": "best-fit"}}
        job = job_for(strategy, Path(folder), dist.get_world_size(), 2, 1, **settings)
        engine = catalog.create("strategy", job.plan.strategy).engine(job.placement, rank)
        model = build_model(job, engine)
        if compiled:
            compile_blocks(model, job.plan)
        engine.prepare(model, optimizer_maker(job.plan))
        try:
            check_isolation(job, engine, torch.device("cpu"))
            answers[kind] = ""
        except LlmftError as error:
            answers[kind] = str(error)
        engine.finish()
    return answers


def gradients_of_both_ways(rank: int, strategy: str, folders: dict[str, str]) -> dict[str, Any]:
    """For each model: the way that was found for its loss, what was said of it, and the loss and gradients of one
    micro-batch on each rank, by the engine and by transformers alone with all logits."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from llmft_core.catalog import Catalog
    from llmft_core.data.batches import Form, collate
    from llmft_core.loading import load_plugins
    from llmft_core.train.loss import Call, micro_batch_loss
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker
    from llmft_core.train.output_probe import find_output_layer

    ranks, catalog, answers = dist.get_world_size(), Catalog(load_plugins()), {}
    # The last rank has nothing to train, and takes part.
    tables = [random_table(4, VOCABULARY, 20, seed=number) for number in range(ranks - 1)]
    tables.append(ListTable([([5, 6, 7], [-100] * 3)] * 4))
    batches = []
    for table in tables:
        rows = Order(table.lengths, 0, capacity=40).epoch(0)
        batches.append(collate(table, rows.step(0, len(rows)), np.arange(len(rows)), 0, Form(0, packed=True)))
    for kind, folder in folders.items():
        plain = AutoModelForCausalLM.from_pretrained(folder)
        expected = 0.0
        for batch in batches:
            ids, labels, positions = map(torch.from_numpy, (batch.input_ids, batch.labels, batch.position_ids))
            logits = plain(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
            share = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            share.backward()
            expected += float(share.detach())
        reference = {name: p.grad.numpy() for name, p in plain.named_parameters()}

        job = job_for(strategy, Path(folder), ranks, 4, 1)
        engine = catalog.create("strategy", job.plan.strategy).engine(job.placement, rank)
        engine.prepare(build_model(job, engine), optimizer_maker(job.plan))
        output, said = find_output_layer(job, engine, torch.device("cpu"))
        loss = micro_batch_loss(engine.model, batches[rank], torch.device("cpu"), Call(output, flat=False))
        if strategy == "ddp":
            engine.backward(loss, last=True)
            found = {name: p.grad for name, p in engine.bare_model.named_parameters()}
        else:  # not through the engine, which clears the gradients with the step
            engine.model.backward(loss * ranks)
            found = {name: safe_get_full_grad(p) for name, p in engine.bare_model.named_parameters()}
        summed = loss.detach().clone()
        dist.all_reduce(summed)
        answers[kind] = {
            "way": output.way,
            "said": said,
            "loss": (float(summed), expected),
            "gradients": {name: (found[name].numpy(), reference[name]) for name in reference},
        }
        engine.finish()
    return answers


def ways_of_strange_models(rank: int, folder: str) -> dict[str, tuple[str, str]]:
    """The way that is found for the loss of models that do something else with their output layer, and what is said."""
    from types import SimpleNamespace

    import torch
    from transformers import LlamaForCausalLM

    from llmft_core.train.output_probe import find_output_layer

    class Another(torch.nn.Linear):
        """A layer that adds something of its own."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) + 1

    def strange(kind: str) -> Any:
        model = LlamaForCausalLM.from_pretrained(folder)
        forward = model.forward

        def changed(**inputs: Any) -> Any:
            answer = forward(**inputs)
            if kind == "capped by tanh at 1000":
                answer.logits = 1000 * torch.tanh(answer.logits / 1000)
            elif kind == "only every other entry":
                answer.logits = answer.logits[..., ::2].repeat_interleave(2, -1)[..., :50]
            return answer

        model.forward = changed
        if kind == "another kind":
            layer = Another(32, VOCABULARY, bias=False)
            layer.weight = model.lm_head.weight
            model.lm_head = layer
        elif kind == "no layer":
            model.get_output_embeddings = lambda: None
        return model

    found = {}
    for kind in ("llama", "capped by tanh at 1000", "another kind", "only every other entry", "no layer", "fp16"):
        job = job_for("ddp", Path(folder), 1, 2, 1, precision="fp16" if kind == "fp16" else "fp32")
        model = strange(kind)
        engine: Any = SimpleNamespace(model=model, bare_model=model)
        if kind == "only every other entry":
            job = replace(job, vocabulary=50)
        output, said = find_output_layer(job, engine, torch.device("cpu"))
        found[kind] = (output.way, said)
    return found
