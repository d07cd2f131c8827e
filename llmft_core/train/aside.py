"""The batch of an odd step, written aside by origin: which rows to look at, the worst micro-batch first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmft_core.data.batches import arrange
from llmft_core.data.order import Rows
from llmft_core.errors import LlmftError
from llmft_core.storage.places import Place
from llmft_core.storage.transfer import write_bytes
from llmft_core.train.job import Job

if TYPE_CHECKING:
    from llmft_core.data.prepare import TokenTable

FOLDER = "aside"
"""The folder of a run in which they lie."""

PutAside = Callable[[str, bytes], str]
"""Write a file (its name, its content) among those that are set aside; its URI, or "" where that failed."""


def put_aside(run: Place, warn: Callable[[str], None]) -> PutAside:
    """Into a run's folder in storage. A failure is a warning: what led here is the news."""

    def put(name: str, content: bytes) -> str:
        place = run / FOLDER / name
        try:
            write_bytes(place, content)
        except LlmftError as error:
            warn(f"{name} could not be written: {error}")
            return ""
        return place.uri

    return put


def batch_lines(job: Job, table: TokenTable, rows: Rows, shares: Sequence[Sequence[float]]) -> bytes:
    """The global batch `rows` as JSONL, a sample a line, those of the micro-batch with the highest loss first. `shares`
    (ranks, micro-batches of a rank) are the parts of the step's loss; the `loss` in a line is that of its micro-batch,
    in nats per trained token, and "nan" or "inf" where it is not finite."""
    decode = decoder(job)
    found = []
    total = max(1, int(table.trained_counts[rows.samples].sum()))
    for index, numbers in enumerate(arrange(table, rows, job.placement.micro_batch)):
        number, rank = divmod(index, job.placement.world_size)
        samples = [sample for row in numbers for sample in rows.samples[rows.bounds[row] : rows.bounds[row + 1]]]
        trained = max(1, int(table.trained_counts[samples].sum())) if samples else 1
        loss = shares[rank][number] * total / trained
        found.append((badness(loss), [*sample_lines(table, samples, rank, number, loss, decode)]))
    found.sort(key=lambda one: -one[0])  # stable: those that are alike stay in their order
    return b"".join(line for _, lines in found for line in lines)


def sample_lines(
    table: TokenTable, samples: Sequence[int], rank: int, micro_batch: int, loss: float, decode: Callable[[Any], Any]
) -> Iterator[bytes]:
    """The samples of one micro-batch."""
    for sample in samples:
        origin = table.origin(sample)
        ids = table.row(sample)[0].tolist()
        line = {
            "file": origin.source,
            "line": origin.line,
            "rank": rank,
            "micro_batch": micro_batch,
            "loss": loss if math.isfinite(loss) else str(loss),
            "tokens": len(ids),
            "trained_tokens": table.trained_tokens(sample),
            **decode(ids),
            "ids": ids,
        }
        yield json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def badness(loss: float) -> float:
    """What is not a number is worse than any number."""
    return loss if math.isfinite(loss) else math.inf


def decoder(job: Job) -> Callable[[list[int]], dict[str, str]]:
    """Ids → `text` of a line; nothing where the job has no fast tokenizer's file."""
    file = job.tokenizer / "tokenizer.json"
    if not file.is_file():
        return lambda ids: {}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: {"text": tokenizer.decode(ids, skip_special_tokens=False)}
