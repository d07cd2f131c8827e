"""Weights & Biases: metrics and the plan as a run there, or offline as files that `wandb sync` sends later."""

from __future__ import annotations

import json
import netrc
import os
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field

from llmft_core import Options, Problem, Tracker, comma_separated, hookimpl

llmft_api = 1

STEP = "train/global_step"
"""The x axis of all charts, under the name that transformers' Trainer gives it."""


class WandbOptions(Options):
    """No secret is among them: the API key comes from WANDB_API_KEY or `wandb login`."""

    mode: Literal["online", "offline"] | None = Field(
        None, description="online, or offline: files that `wandb sync` sends later; default: WANDB_MODE, else online"
    )
    project: str = Field("", description="project; default: WANDB_PROJECT, else llmft")
    entity: str = Field("", description="user or team; default: WANDB_ENTITY, else your own default")
    group: str = Field("", description="group of runs that are compared with each other")
    tags: Annotated[list[str], BeforeValidator(comma_separated)] = Field([], description="labels of the run (A,B)")
    finish_seconds: float = Field(
        300, ge=0, description="longest wait at the end for what is not sent yet, s; 0: for as long as it takes"
    )


class Wandb(Tracker):
    """A run of Weights & Biases, under the id in `wandb/run.json` of the run's folder: `llmft resume` goes on with it.

    Charts are drawn over the optimizer step, and not over W&B's own count of calls, which only rises: steps that are
    done again after a resume fall on the points of the first time, whose numbers they repeat.
    """

    name = "wandb"
    summary = "Weights & Biases, online or offline (pip install 'llmft[wandb]')"
    options_type = WandbOptions

    def __init__(self, options: WandbOptions) -> None:
        super().__init__(options)
        self._run: Any = None

    @property
    def _mode(self) -> str:
        return self.options.mode or os.environ.get("WANDB_MODE") or "online"

    def problems(self) -> list[Problem]:
        """Without the package, or online without an API key, the run would be watched by nobody."""
        if find_spec("wandb") is None:
            return [Problem("tracker", "wandb is not installed: pip install 'llmft[wandb]'")]
        if self._mode == "online" and not _knows_a_key():
            why = "wandb knows no API key: set WANDB_API_KEY, run `wandb login`, or choose `mode: offline`"
            return [Problem("tracker", why)]
        return []

    def start(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """A new run, with the plan as its configuration."""
        self._open(folder, plan, secrets.token_hex(4), resume="never")

    def resume(self, folder: Path, plan: Mapping[str, Any], step: int) -> None:
        """The run that the folder tells of; a new one where it was not tracked here before."""
        note = folder / "wandb" / "run.json"
        if note.exists():
            self._open(folder, plan, str(json.loads(note.read_text(encoding="utf-8"))["id"]), resume="allow")
        else:
            self.start(folder, plan)

    def _open(self, folder: Path, plan: Mapping[str, Any], run_id: str, resume: Literal["never", "allow"]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's reports of its own errors to its makers
        import wandb

        offline = self._mode != "online"
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode="offline" if offline else "online",
            project=self.options.project or os.environ.get("WANDB_PROJECT") or "llmft",
            entity=self.options.entity or None,
            group=self.options.group or None,
            tags=self.options.tags or None,
            id=run_id,
            name=str(plan.get("name") or "") or None,
            dir=folder,
            config={"plan": dict(plan)},
            allow_val_change=True,  # a resumed run may have another number of workers
            resume=None if offline else resume,  # offline, `wandb sync` joins what has one id
            settings=wandb.Settings(
                console="off",  # the progress bar is no log
                silent=offline,  # online it prints the run's address
                symlink=False,  # the folder is copied to storage, which knows no links
                disable_git=True,  # the working directory need not be the run's
                disable_code=True,
                finish_timeout=self.options.finish_seconds,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        (folder / "wandb" / "run.json").write_text(json.dumps({"id": run_id}) + "\n", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands one point to wandb's own process, which sends it. Raises RuntimeError before `start`."""
        if self._run is None:
            raise RuntimeError("wandb: log() was called before start()")
        self._run.log({**{name: float(value) for name, value in metrics.items()}, STEP: step})

    def finish(self) -> None:
        """Waits until all is sent. Raises TimeoutError after `finish-seconds`: `wandb sync` sends the rest."""
        self._close(exit_code=0)

    def break_off(self, *, by_user: bool) -> None:
        """As `finish`; W&B shows the run as failed, its only word for that."""
        self._close(exit_code=1)

    def _close(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is not None:
            import wandb

            run.finish(exit_code)
            wandb.teardown()  # offline, finish() returns before wandb's own process has written the file


def _knows_a_key() -> bool:
    """Whether wandb will find a login by itself, where it looks; if not, it asks on a terminal and fails elsewhere."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    settings = wandb.setup().settings
    if settings.api_key:
        return True
    hosts = {urlsplit(settings.base_url).netloc, "api.wandb.ai"}  # the latter: where `wandb login` filed keys for years
    try:
        logins = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError):
        return False
    return any(logins.authenticators(host) for host in hosts)


@hookimpl
def llmft_trackers() -> list[type[Tracker]]:
    """Weights & Biases."""
    return [Wandb]
