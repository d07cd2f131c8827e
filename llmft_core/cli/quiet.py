"""What third parties have to say."""

from __future__ import annotations

import warnings


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
