"""What a rank does in tests of --compile; here, because a spawned process has to import it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tables import InMemory, random_table
from training import TRAIN, VOCABULARY, Recorder, job_for, prepared

LONGEST = 20  # tokens


class Case(NamedTuple):
    """One run of a rank."""

    strategy: str
    precision: str
    compiled: bool = True
    method: str | dict[str, Any] = "full"
    settings: Mapping[str, Any] = MappingProxyType({})
    """Of the plan."""
    layout: tuple[int, int] = (2, 2)
    """Rows of a micro-batch, micro-batches of a rank in a step."""
    eager_dropout: bool = False
    """Dropout draws the numbers that it draws without a compiler."""


def train_all(rank: int, base: str, world_size: int, cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Each case has the fields of `Case`; what each run logged and said, how many graphs were made ahead and in all,
    and the names and shapes of its parameters."""
    import torch
    from torch._dynamo.utils import counters

    from llmft_core.catalog import Catalog
    from llmft_core.loading import load_plugins
    from llmft_core.train.compiled import graphs
    from llmft_core.train.loop import train

    data = InMemory(TRAIN, random_table(5, VOCABULARY, LONGEST, seed=1))
    catalog = Catalog(load_plugins())
    answers = []
    for case in (Case(*fields) for fields in cases):
        torch._dynamo.reset()
        counters.clear()
        torch._inductor.config.fallback_random = case.eager_dropout
        settings = {
            "context-length": LONGEST,
            "lr": 1e-3,
            "method": case.method,
            "precision": case.precision,
            **case.settings,
        }
        settings["compile"] = case.compiled
        job = job_for(case.strategy, Path(base), world_size, *case.layout, **settings)
        engine = prepared(job, rank, catalog)
        recorder = Recorder()
        train(job, engine, data, rank, recorder, lambda *_: None)  # type: ignore[arg-type]
        found = [event["metrics"] for event in recorder.events if event["kind"] == "metrics"]
        answers.append(
            {
                "loss": [metrics["train/loss"] for metrics in found],
                "norm": [metrics["train/grad_norm"] for metrics in found],
                "eval": [metrics["eval/loss"] for metrics in found if "eval/loss" in metrics],
                "said": [event["text"] for event in recorder.events if event["kind"] in ("phase", "warning")],
                "graphs": graphs(),
                "breaks": dict(counters["graph_break"]),
                "shapes": engine.shapes(),
            }
        )
        engine.finish()
    return answers


def errors_of_the_compiler(rank: int) -> dict[str, str]:
    """What is said of models whose blocks cannot be compiled, or would be again and again."""
    import torch

    from llmft_core.errors import LlmftError
    from llmft_core.plan import RunPlan
    from llmft_core.train import compiled

    class Block(torch.nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            if hidden.shape[-1] == 3 and hidden.sum() > 0:
                return hidden
            return hidden * self.number

    class Model(torch.nn.Module):
        def __init__(self, *named: str) -> None:
            super().__init__()
            self._no_split_modules = named
            self.blocks = torch.nn.ModuleList(Block(number) for number in range(2, 7))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    compiled.MOST_GRAPHS = 4
    found = {}
    for kind, named, width in (("nameless", (), 2), ("values", ("Block",), 3), ("many", ("Block",), 2)):
        model = Model(*named)
        try:
            compiled.compile_blocks(model, RunPlan())
            with compiled.compiler_errors(True):
                model(torch.ones(1, width))
            found[kind] = ""
        except LlmftError as error:
            found[kind] = str(error)
    return found
