"""The file in which all rows lie that cannot be used, with their original bytes and what is wrong with them."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import IO

from llmft_core.values import Origin, RowProblem


class Quarantine:
    """Writes `{"file", "line", "field", "reason", "raw"}`, a row a line; `raw_base64` instead of `raw` where the bytes
    are not UTF-8. The file appears under its name when it is complete; where there are no such rows there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._draft = path.with_name(f".{path.name}.draft")
        self._file: IO[bytes] | None = None

    def add(self, origin: Origin, problem: RowProblem, raw: bytes) -> None:
        """One row. Raises OSError where it cannot be written."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._draft.open("wb")
        row: dict[str, str | int] = {
            "file": origin.source,
            "line": origin.line,
            "field": problem.field,
            "reason": problem.reason,
        }
        try:
            row["raw"] = raw.decode("utf-8")
        except UnicodeDecodeError:
            row["raw_base64"] = base64.b64encode(raw).decode("ascii")
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def finish(self) -> None:
        """All rows have been seen."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(self._draft, self.path)

    def discard(self) -> None:
        """Leave nothing of a file that was not finished."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._draft.unlink(missing_ok=True)
