"""What all kinds of extension share."""

from __future__ import annotations

from typing import Any, ClassVar

from llmft_core.errors import Problem
from llmft_core.options import Options
from llmft_core.values import Device


class Extension:
    """What all kinds share."""

    name: ClassVar[str]
    """The name it is chosen by: `--storage NAME`."""
    summary: ClassVar[str]
    """One line for `llmft plugins`."""
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Any) -> None:
        self.options = options

    def node_problems(self, device: Device) -> list[Problem]:
        """What this machine lacks (a folder, a package) for ranks that compute on such a device. The dataset format,
        storage, strategy and method of a run are asked on every node that may get a rank, before anything is staged."""
        return []
