"""Training that stands still where a test wants it: what the test does meanwhile comes neither early nor late."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from running import Running

PLUGIN = Path(__file__).parent / "held"


class Hold:
    """Ranks of runs with these `flags` and this `environment` stand still in their forward pass number `in_pass` (from
    0, since the process began to train) until they are released; those that come to it later do not."""

    flags = ("--method", "held")

    def __init__(self, folder: Path, in_pass: int, *, until_told: bool = False) -> None:
        """`until_told`: a released rank 0 goes on only when it has heard that it is to stop. It looks once a second
        under Ray, in which a short run would end."""
        folder.mkdir(exist_ok=True)
        self._go = folder / "go"
        paths = [str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "HELD_IN_PASS": str(in_pass),
            "HELD_UNTIL": str(self._go),
            **({"HELD_UNTIL_TOLD": "1"} if until_told else {}),
        }

    def wait(self, running: Running) -> None:
        """Until a rank stands still."""
        held = self._go.with_suffix(".held")
        running.wait_until(lambda _: held.exists(), "rank that stands still")

    def release(self) -> None:
        """All of them go on."""
        self._go.touch()
