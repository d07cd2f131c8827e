"""`llmft dataset create|check|preview|stats`: look at the data before anything is trained on it.

Each action is a file of its own, `dataset_ACTION.py`, with `run_command` and a line for the help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from llmft_core.errors import InputError, close_match

PROG = "llmft dataset"
ACTIONS: dict[str, str] = {
    "create": "a dataset with tags as train.jsonl, test.jsonl and tokens.json of chat-tags",
    "check": "every row that cannot be used, by file and line, and what looks wrong in the others",
    "preview": "rows exactly as the model sees them, token by token",
    "stats": "lengths, padding and vocabulary, to choose context length and packing by",
}  # action → what it does


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    given = list(argv)
    if given and given[0] in ACTIONS:
        module = import_module(f"llmft_core.cli.dataset_{given[0]}")
        code: int = module.run_command(given[1:], environ, folder)
        return code
    if given and given[0] in ("-h", "--help"):
        print(f"usage: {PROG} ACTION [flags of llmft run]\n")
        for name, text in ACTIONS.items():
            print(f"  {name:<10}{text}")
        print(f"\n`{PROG} ACTION --help` lists its flags.")
        return 0
    word = given[0] if given else ""
    said = f"no action is called {word}{close_match(word, ACTIONS)}" if word else "no action is given"
    raise InputError(f"{said}; there are {', '.join(ACTIONS)}: `{PROG} --help`")
