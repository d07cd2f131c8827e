"""Two states of which the first is not published, of all ranks; here, because a spawned process has to import it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from resuming import Case, job_for, prepared
from training import Recorder


def take_two(rank: int, case: Case, spoilt: str, cache: Path) -> dict[str, Any]:
    """`spoilt`: what is wrong while the first one is taken: the `store`, or the `disk` of rank 1."""
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
