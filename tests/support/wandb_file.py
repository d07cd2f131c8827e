"""Reads what wandb writes offline: a log of records in LevelDB's format, which `wandb sync` sends later."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32768  # bytes: of the file and of each piece; of a block
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """Every record; one that was cut off at the end, by a kill, is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        piece = data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if len(piece) < length or kind == 0:
            return
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, a dictionary for each call."""
    logged = [record.history for record in records(path) if record.HasField("history")]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in one.item} for one in logged]


def configuration(path: Path) -> dict[str, Any]:
    """The run's configuration."""
    run = next(record.run for record in records(path) if record.HasField("run"))
    return {item.key: json.loads(item.value_json) for item in run.config.update}
