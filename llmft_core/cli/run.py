"""`llmft run`: train."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmft_core.cli.flags import read_flags


def run_command(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Returns the exit code; raises LlmftError."""
    given = read_flags(argv, environ, folder, "llmft run")
    if given.help:
        given.parser.print_help()
        return 0
    plan = given.plan()
    if not given.debug:
        quiet()
    from llmft_core.report.summary import summary
    from llmft_core.run import run

    outcome = run(plan, given.catalog, debug=given.debug)
    for line in summary(outcome):
        print(line)
    return 0


def quiet() -> None:
    """Third parties' warnings and logs are for --debug; what matters is said by us."""
    import logging
    import os

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about its own future default
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("ray", "ray.train", "ray.data", "accelerate", "transformers", "DeepSpeed", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
