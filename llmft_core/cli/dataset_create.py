"""`llmft dataset create NAME --out FOLDER`: a dataset as train.jsonl, test.jsonl and tokens.json of `chat-tags`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmft_core.cli.flags import Parser, read_flags
from llmft_core.cli.quiet import quiet
from llmft_core.errors import InputError

PROG = "llmft dataset create"
EXAMPLE = f"`{PROG} gsm8k --out data`"


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    words = list(argv)
    name = words.pop(0) if words and not words[0].startswith("-") else ""
    parser = Parser(prog=PROG)
    parser.add_argument("--out", metavar="FOLDER")
    own, rest = parser.parse_known_args(words)
    given = read_flags([*(["--dataset", name] if name else []), *rest], environ, folder, PROG)
    if given.help:
        given.parser.usage = f"{PROG} [NAME] --out FOLDER [flags]"
        given.parser.add_argument("--out", metavar="FOLDER", help="where the three files are written")
        given.parser.print_help()
        return 0
    if not own.out:
        raise InputError(f"no folder is given to write to: {EXAMPLE}")
    plan = given.plan()
    if not given.debug:
        quiet()
    from llmft_core.data.create import create
    from llmft_core.data.formats import open_dataset
    from llmft_core.storage.places import Places

    dataset, sources = open_dataset(given.catalog, plan, Places(given.catalog, plan.storage, plan.backends))
    created = create(dataset, sources, given.catalog, Path(own.out).expanduser())
    for path, count in created.files.items():
        print(f"{path}: {count:,} {'tokens' if path.name == 'tokens.json' else 'rows'}")
    print(" ".join(["train on them:  llmft run --dataset chat-tags --dataset.source", own.out, *created.flags]))
    return 0
