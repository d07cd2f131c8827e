"""What ranks do whose states are lost or late; here, because a spawned process has to import it."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from resuming import ROWS, VOCABULARY, Case, job_for
from tables import InMemory, random_table
from training import Recorder, prepared


def take_two(rank: int, case: Case, spoilt: str, cache: Path) -> dict[str, Any]:
    """Two states. `spoilt`: what is wrong while the first one is taken: the `store`, or the `disk` of rank 1."""
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.train.state_saver import StateSaver

    catalog, run, recorder = Catalog(load_plugins()), Path(case.run), Recorder()
    os.environ["LLMFT_CACHE"] = str(cache)
    in_the_way = run / "state_00000" if spoilt == "store" else cache / "a file"
    if rank == 0:
        run.mkdir()
        cache.mkdir()
        in_the_way.write_text("where a folder should be")
    if spoilt == "disk" and rank == 1:
        os.environ["LLMFT_CACHE"] = str(in_the_way)
    engine = prepared(job_for(case), rank, catalog)
    dist.barrier()
    with StateSaver(job_for(case), engine, rank, recorder, Places(catalog, None, {}).place(case.run)) as states:
        states.save(1, {})
        first = states.background.pending
        assert first is not None
        error = first.exception()  # both ranks may still say what they have to say
        told = [(event["kind"], event.get("name")) for event in recorder.events if event["kind"] != "stall"]
        os.environ["LLMFT_CACHE"] = str(cache)
        dist.barrier()
        states.save(2, {})
    engine.finish()
    return {"error": str(error), "told": told, "events": recorder.events}


def train_beside_a_slow_upload(rank: int, case: Case, until: int, cache: Path) -> list[int]:
    """Train with a state due after each step, of which rank 1 writes none before the forward pass of optimizer step
    number `until` (from 1). The steps whose states were published."""
    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.storage.places import Places
    from llmft_core.train.loop import train
    from llmft_core.train.state_saver import StateSaver

    os.environ["LLMFT_CACHE"] = str(cache)
    catalog, recorder, is_there = Catalog(load_plugins()), Recorder(), threading.Event()
    job = job_for(case)
    always = job.plan.state.model_copy(update={"every_minutes": 1e-9})
    job = replace(job, plan=job.plan.model_copy(update={"state": always}))
    engine = prepared(job, rank, catalog)
    passes = 0  # one a step

    def count(model: Any, _: Any) -> None:
        nonlocal passes
        passes += model.training
        if passes == until:
            is_there.set()
        elif passes == until + 1 and states.background.pending is not None:
            states.background.pending.exception()  # so that the clock's next state has a step left to come after

    engine.bare_model.register_forward_pre_hook(count)
    with StateSaver(job, engine, rank, recorder, Places(catalog, None, {}).place(case.run)) as states:
        if rank == 1:
            write = states._written

            def late(*args: Any) -> Any:
                assert is_there.wait(120), "training waited for this"
                return write(*args)

            states._written = late  # type: ignore[method-assign]
        data = InMemory(random_table(ROWS, VOCABULARY, 20))
        train(job, engine, data, rank, recorder, lambda *_: None, states)  # type: ignore[arg-type]
    engine.finish()
    return [event["step"] for event in recorder.events if event["kind"] == "state"]
