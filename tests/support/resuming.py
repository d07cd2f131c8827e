"""What a rank does in tests of states; here, because a spawned process has to import it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tables import InMemory, random_table
from training import Recorder

from llmft_core.plan import RunPlan
from llmft_core.train.job import Job, Resume
from llmft_core.values import Placement

ROWS, VOCABULARY, GLOBAL_BATCH = 14, 101, 4  # rows are no multiple of the batch: the tail is trained too
EPOCH_STEPS = (4, 4, 4)
TOTAL = 10


def job_for(strategy: str | dict[str, Any], precision: str, world_size: int, base: str, at: int) -> Job:
    """`at`: the state is written after so many steps."""
    plan = RunPlan.from_json(
        {
            "strategy": strategy,
            "lr": 1e-2,
            "weight-decay": 0.1,
            "precision": precision,
            "global-batch": GLOBAL_BATCH,
            "name": "x",
            "state": {"every-steps": at, "every-minutes": 0, "keep-last": 9},
        }
    )
    micro = GLOBAL_BATCH // world_size
    placement = Placement(world_size, "cpu", precision, micro, 1, plan.max_grad_norm)  # type: ignore[arg-type]
    return Job(plan, placement, TOTAL, EPOCH_STEPS, VOCABULARY, 0, (), {}, Path(base), Path(), Path())


def train_on(rank: int, cases: list[tuple[Any, str, str, int, str, int]]) -> list[dict[str, Any]]:
    """Each case is (strategy as a plan names it, precision, base, world size, run, step of the state to go on from; 0:
    from the beginning). Losses of its steps, all fragments afterwards, and the states that were written."""
    from llmft_core.catalog import Catalog
    from llmft_core.checkpoint.state import copies, views
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.train.loop import train
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker
    from llmft_core.train.state_saver import StateSaver
    from llmft_core.train.worker import restore_state

    data = InMemory(random_table(ROWS, VOCABULARY, 20))

    catalog = Catalog(load_plugins())
    answers = []
    for strategy, precision, base, world_size, run, step in cases:
        place = Places(catalog, None, {}).place(run)
        job = job_for(strategy, precision, world_size, base, at=TOTAL // 2)
        if step:
            resume = Resume((place / "state_00000").uri, step, 7, 0)
            job = replace(job, resume=resume)
        engine = catalog.create("strategy", job.plan.strategy).engine(job.placement, rank)
        engine.prepare(build_model(job, engine), optimizer_maker(job.plan, "cpu"))
        if job.resume is not None:
            restore_state(Places(catalog, None, {}).place(job.resume.state), engine)
        recorder = Recorder()
        with StateSaver(job, engine, rank, recorder, place) as states:
            train(job, engine, data, rank, recorder, lambda *_: None, states.save)  # type: ignore[arg-type]
        answers.append(
            {
                "loss": [event["metrics"]["train/loss"] for event in recorder.events if event["kind"] == "metrics"],
                "fragments": {key: values.numpy() for key, values in copies(views(engine.fragments())).items()},
                "states": [event["name"] for event in recorder.events if event["kind"] == "state"],
                "counters": engine.counters(),
            }
        )
        engine.finish()
    return answers
