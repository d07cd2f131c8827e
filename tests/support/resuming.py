"""What a rank does in tests of states; here, because a spawned process has to import it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tables import InMemory, random_table
from training import Recorder, prepared

from llmft_core.plan import RunPlan
from llmft_core.train.job import Job, Resume
from llmft_core.values import Placement

ROWS, VOCABULARY, GLOBAL_BATCH = 14, 101, 4  # rows are no multiple of the batch: the tail is trained too
STEPS_OF_AN_EPOCH = 4
TOTAL = 10


class Case(NamedTuple):
    """One run of a rank."""

    strategy: str | dict[str, Any]
    precision: str
    base: str
    world_size: int
    run: str
    """Folder of its states."""
    step: int
    """Of the state to go on from; 0: from the beginning."""
    total: int = TOTAL
    at: int = TOTAL // 2
    """A state is written after so many steps; 0: none."""
    method: str | dict[str, Any] = "full"
    lr: float = 1e-2
    recompute: bool = False
    """Gradient checkpointing."""
    chunk: int = 1000
    """Positions in a chunk of the loss; a micro-batch has fewer than this."""
    compiled: bool = False


def job_for(case: Case) -> Job:
    """The job of a case, as the driver would send it."""
    precision, world_size = case.precision, case.world_size
    plan = RunPlan.from_json(
        {
            "strategy": case.strategy,
            "method": case.method,
            "lr": case.lr,
            "weight-decay": 0.1,
            "precision": precision,
            "global-batch": GLOBAL_BATCH,
            "gradient-checkpointing": case.recompute,
            "name": "x",
            "context-length": 20,
            "compile": case.compiled,
            "state": {"every-steps": case.at, "every-minutes": 0, "keep-last": 9},
        }
    )
    micro = GLOBAL_BATCH // world_size
    placement = Placement(world_size, "cpu", precision, micro, 1, plan.max_grad_norm)  # type: ignore[arg-type]
    epochs = -(-case.total // STEPS_OF_AN_EPOCH)
    return Job(
        plan,
        placement,
        case.total,
        (STEPS_OF_AN_EPOCH,) * epochs,
        VOCABULARY,
        0,
        (),
        {},
        Path(case.base),
        Path(),
        Path(),
    )


def train_on(rank: int, cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Each case has the fields of `Case`. Losses of its steps, all fragments afterwards, the states that were written,
    and how often the first layer was computed in training."""
    import torch

    from llmft_core.catalog import Catalog
    from llmft_core.checkpoint.state import copies, views
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.train import chunked_loss
    from llmft_core.train.loop import train
    from llmft_core.train.state_saver import StateSaver
    from llmft_core.train.worker import restore_state

    data = InMemory(random_table(ROWS, VOCABULARY, 20))
    catalog = Catalog(load_plugins())
    answers = []
    for case in (Case(*fields) for fields in cases):
        place = Places(catalog, None, {}).place(case.run)
        job = job_for(case)
        chunked_loss.CHUNK_BYTES["cpu"] = case.chunk * 4 * VOCABULARY
        if case.step:
            resume = Resume((place / "state_00000").uri, case.step, 7, 0)
            job = replace(job, resume=resume)
        engine = prepared(job, rank, catalog)
        if job.resume is not None:
            restore_state(Places(catalog, None, {}).place(job.resume.state), engine)
        passes: list[bool] = []
        if not case.compiled:  # a hook within a block would be compiled too
            # Of what the layer begins with, and before it is computed: what is computed again is its inside, and as far
            # as it is needed.
            engine.bare_model.model.layers[0].input_layernorm.register_forward_pre_hook(
                lambda *_, passes=passes: passes.append(torch.is_grad_enabled())
            )
        recorder = Recorder()
        with StateSaver(job, engine, rank, recorder, place) as states:
            train(job, engine, data, rank, recorder, lambda *_: None, states)  # type: ignore[arg-type]
        answers.append(
            {
                "loss": [event["metrics"]["train/loss"] for event in recorder.events if event["kind"] == "metrics"],
                "fragments": {key: values.numpy() for key, values in copies(views(engine.fragments())).items()},
                "states": [event["name"] for event in recorder.events if event["kind"] == "state"],
                "counters": engine.counters(),
                "layer_passes": sum(passes),
                "phases": [event["text"] for event in recorder.events if event["kind"] == "phase"],
            }
        )
        engine.finish()
    return answers
