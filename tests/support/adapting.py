"""What a rank does in tests of adapters; here, because a spawned process has to import it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tables import InMemory, random_table
from training import Recorder

from llmft_core.plan import RunPlan
from llmft_core.train.job import Job, Resume
from llmft_core.values import Placement
from llmft_core.weights.files import identity

ROWS, VOCABULARY, SPECIAL_IDS, GLOBAL_BATCH = 14, 101, (97, 98, 99, 100), 4  # the model has 97 rows
EPOCH_STEPS = (4, 4, 4)
TOTAL = 8
AT = TOTAL // 2


def job_for(strategy: Any, precision: str, world_size: int, base: str, method: dict[str, Any]) -> Job:
    """A run whose state is written in its middle, which is also the middle of an epoch."""
    plan = RunPlan.from_json(
        {
            "strategy": strategy,
            "method": {"name": "lora", **method},
            "model": base,
            "lr": 1e-2,
            "weight-decay": 0.1,
            "precision": precision,
            "global-batch": GLOBAL_BATCH,
            "name": "x",
            "checkpoint": {"every-epochs": 0},
            "state": {"every-steps": AT, "every-minutes": 0},
        }
    )
    placement = Placement(world_size, "cpu", precision, 1, GLOBAL_BATCH // world_size, plan.max_grad_norm)  # type: ignore[arg-type]
    tokenizer = Path(base) / "tokenizer"
    provenance = {"plan": plan.to_json(), "model": identity(Path(base))}
    return Job(
        plan,
        placement,
        TOTAL,
        EPOCH_STEPS,
        VOCABULARY,
        0,
        (7,),
        provenance,
        Path(base),
        Path(),
        tokenizer,
        None,
        SPECIAL_IDS,
    )


def train_adapter(rank: int, cases: list[tuple[Any, str, int, str, str, dict[str, Any], int]]) -> list[dict[str, Any]]:
    """Each case is (strategy, precision, world size, base, run, options of the method, step of the state to go on
    from; 0: from the beginning). Losses, all fragments afterwards, and the logits of a row, with dropout off."""
    import torch

    from llmft_core.catalog import Catalog
    from llmft_core.checkpoint.adapter import start_of
    from llmft_core.checkpoint.state import copies, views
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.train.loop import train
    from llmft_core.train.method import applied, setting_of
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker
    from llmft_core.train.saver import Saver
    from llmft_core.train.state_saver import StateSaver
    from llmft_core.train.worker import restore_state

    data = InMemory(random_table(ROWS, VOCABULARY, 20))
    catalog = Catalog(load_plugins())
    places = Places(catalog, None, {})
    answers = []
    for strategy, precision, world_size, base, run, options, step in cases:
        job = job_for(strategy, precision, world_size, base, options)
        place = places.place(run)
        if step:
            job = replace(job, resume=Resume((place / "state_00000").uri, step, 7, 7))
        method = catalog.create("method", job.plan.method)
        setting = setting_of(job.plan, job.placement, job.special_ids, catalog)
        engine = catalog.create("strategy", job.plan.strategy).engine(job.placement, rank)
        loading = {} if setting.partitioned else method.loading(setting)
        model = applied(method, build_model(job, engine, loading=loading), setting, engine)
        adapter = method.adapter(model, setting)
        types = {str(parameter.dtype) for parameter in model.parameters() if not parameter.requires_grad}
        engine.prepare(model, optimizer_maker(job.plan))
        start = start_of(engine, adapter)
        began = engine.gathered(list(adapter.tensors), torch.float32)
        if job.resume is not None:
            restore_state(places.place(job.resume.state), engine)
        recorder = Recorder()
        with (
            Saver(job, engine, rank, recorder, place, start) as saver,
            StateSaver(job, engine, rank, saver, place, saver.background) as states,
        ):
            train(job, engine, data, rank, saver, saver.save, states)  # type: ignore[arg-type]
        ended = engine.gathered(list(adapter.tensors), torch.float32)
        engine.model.eval()
        with torch.no_grad():
            logits = engine.model(torch.tensor([[1, 97, 5, 98, 99, 7, 100]])).logits.float().numpy()
        metrics = [event["metrics"] for event in recorder.events if event["kind"] == "metrics"]
        answers.append(
            {
                "loss": [found["train/loss"] for found in metrics],
                "norm": [found["train/grad_norm"] for found in metrics],
                "fragments": {key: values.numpy() for key, values in copies(views(engine.fragments())).items()},
                "began": {name: values.numpy() for name, values in began.items()},
                "ended": {name: values.numpy() for name, values in ended.items()},
                "logits": logits,
                "frozen_types": types,
                "events": [event["kind"] for event in recorder.events],
            }
        )
        engine.finish()
    return answers
