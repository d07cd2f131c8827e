"""What a rank does in tests of the guards; here, because a spawned process has to import it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tables import InMemory, random_table
from training import Recorder

from llmft_core.plan import RunPlan
from llmft_core.train.job import Job, Resume
from llmft_core.values import Placement

ROWS, VOCABULARY, GLOBAL_BATCH = 16, 101, 4
Wrong = tuple[int, int, int, str]
"""(step from 0, micro-batch of a rank, rank, what happens to it: nan, gradient or jump)"""


def guarded(rank: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case is a run: `strategy`, `precision`, `base`, `run`, `world_size`, `steps`, `settings` of the plan,
    `wrong` (what is wrong in it), `from_state` (whether it goes on from its newest state). This rank's answers."""
    import torch.distributed as dist

    from llmft_core.catalog import Catalog
    from llmft_core.checkpoint.state import copies, views
    from llmft_core.checkpoint.stored_state import newest_state, open_state
    from llmft_core.errors import LlmftError
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.train.aside import put_aside
    from llmft_core.train.loop import train
    from llmft_core.train.model import build_model
    from llmft_core.train.optimizer import optimizer_maker
    from llmft_core.train.state_saver import StateSaver
    from llmft_core.train.worker import restore_state

    data = InMemory(random_table(ROWS, VOCABULARY, 20))
    catalog = Catalog(load_plugins())
    answers = []
    for case in cases:
        run = Places(catalog, None, {}).place(case["run"])
        job = job_of(case)
        if case.get("from_state"):
            dist.barrier()  # the state is whole once rank 0 has left the run before this one
            place = newest_state(run)
            assert place is not None
            progress = open_state(place).progress
            job = replace(job, resume=Resume(place.uri, progress.step, 5, 0, progress.guards))
        engine = catalog.create("strategy", job.plan.strategy).engine(job.placement, rank)
        engine.prepare(build_model(job, engine), optimizer_maker(job.plan))
        if job.resume is not None:
            restore_state(Places(catalog, None, {}).place(job.resume.state), engine)
        first = job.resume.step if job.resume else 0
        spoil(engine, rank, first, job.placement.accumulation, case["wrong"])
        recorder, error = Recorder(), ""
        try:
            with StateSaver(job, engine, rank, recorder, run) as states:
                train(
                    job,
                    engine,
                    data,  # type: ignore[arg-type]
                    rank,
                    recorder,
                    lambda *_: None,
                    states,
                    put_aside(run, recorder.warn),
                )
        except LlmftError as raised:
            error = str(raised)
        answers.append(
            {
                "error": error,
                "warnings": [event["text"] for event in recorder.events if event["kind"] == "warning"],
                "metrics": [event["metrics"] for event in recorder.events if event["kind"] == "metrics"],
                "fragments": {key: values.numpy() for key, values in copies(views(engine.fragments())).items()},
                "counters": engine.counters(),
            }
        )
        engine.finish()
    return answers


def job_of(case: dict[str, Any]) -> Job:
    settings = {"lr": 1e-2, "global-batch": GLOBAL_BATCH, "name": "x", **case.get("settings", {})}
    settings = {"state": {"every-minutes": 0}, **settings}
    plan = RunPlan.from_json({"strategy": case["strategy"], "precision": case["precision"], **settings})
    world_size = case["world_size"]
    placement = Placement(world_size, "cpu", case["precision"], 1, GLOBAL_BATCH // world_size, plan.max_grad_norm)
    epochs = -(-case["steps"] * GLOBAL_BATCH // ROWS)
    steps = (ROWS // GLOBAL_BATCH,) * epochs
    tokenizer = Path(case.get("tokenizer", ""))
    return Job(plan, placement, case["steps"], steps, VOCABULARY, 0, (), {}, Path(case["base"]), Path(), tokenizer)


def spoil(engine: Any, rank: int, first: int, accumulation: int, wrong: list[Wrong]) -> None:
    """From now on these forward passes of training go wrong."""
    import torch

    passes = iter(range(10_000))

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():  # a probe before training, or an evaluation
            return
        step, micro_batch = divmod(next(passes), accumulation)
        hidden = output.last_hidden_state
        for kind in [kind for *where, kind in wrong if where == [first + step, micro_batch, rank]]:
            if kind == "gradient":
                hidden.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
            else:
                hidden.data.mul_(float("nan") if kind == "nan" else 40.0)

    engine.bare_model.model.register_forward_hook(hook)
