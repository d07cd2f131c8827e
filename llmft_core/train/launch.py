"""Launching: the only file that knows Ray Train. The plan travels as JSON; events come back through an actor."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmft_core.errors import Interrupted, LlmftError, one_line
from llmft_core.train.cluster import Cluster
from llmft_core.train.job import Job

OnEvent = Callable[[dict[str, Any]], None]

POLL_SECONDS = 0.2


def launch(job: Job, cluster: Cluster, folders: Mapping[str, Mapping[str, str]], on_event: OnEvent) -> None:
    """Train, and return when the last checkpoint is complete. `folders` has each node's copies by node id.

    Raises LlmftError when a rank failed, Interrupted after Ctrl-C.
    """
    if cluster.address == "":
        train_in_process(job, on_event)
    else:
        train_on_ray(job, cluster, folders, on_event)


class CallReporter:
    """Events of a rank in this process."""

    def __init__(self, on_event: OnEvent) -> None:
        self.send = on_event


def train_in_process(job: Job, on_event: OnEvent) -> None:
    """One rank, here, without a cluster: to debug, and to train on one GPU."""
    import torch
    import torch.distributed as dist

    from llmft_core.train.worker import train_rank

    # accelerate and DeepSpeed read the layout from these.
    layout = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    layout["ACCELERATE_TORCH_DEVICE"] = "cpu" if job.placement.device == "cpu" else "cuda:0"  # as Ray Train sets it
    before = {name: os.environ.get(name) for name in (*layout, "MASTER_PORT")}
    os.environ.update(layout, MASTER_PORT=str(_free_port()))
    backend = "gloo" if job.placement.device == "cpu" else "cpu:gloo,cuda:nccl"
    if job.placement.device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        train_rank(job, 0, CallReporter(on_event))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Mailbox:
    """An actor that holds events until the driver takes them."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        taken, self.events = self.events, []
        return taken


class MailboxReporter:
    """A rank's end of the mailbox: sending does not wait, leaving does."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self.last: Any = None

    def send(self, event: dict[str, Any]) -> None:
        self.last = self.mailbox.put.remote(event)

    def flush(self) -> None:
        """Wait until the last event has arrived (calls of one caller arrive in order)."""
        import ray

        if self.last is not None:
            ray.get(self.last)


def rank_main(config: dict[str, Any]) -> None:
    """The training function that Ray Train calls on every worker."""
    import ray
    import ray.train

    from llmft_core.train.worker import train_rank

    node = ray.get_runtime_context().get_node_id()
    reporter = MailboxReporter(config["mailbox"])
    try:
        if node not in config["folders"]:
            raise LlmftError("this node joined the cluster after the run was prepared: start the run again")
        job = Job.from_json({**config["job"], **config["folders"][node]})
        train_rank(job, ray.train.get_context().get_world_rank(), reporter)
    except Exception as error:
        text = one_line(error) if isinstance(error, LlmftError) else f"{type(error).__name__}: {one_line(error)}"
        rank = ray.train.get_context().get_world_rank()
        reporter.send({"kind": "error", "message": text, "rank": rank})
        raise
    finally:
        reporter.flush()


def train_on_ray(job: Job, cluster: Cluster, folders: Mapping[str, Mapping[str, str]], on_event: OnEvent) -> None:
    """Ray Train V2. Its own checkpoints are not used: our marker is the truth, and our uploads are verified."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    errors: list[dict[str, Any]] = []

    def handle(event: dict[str, Any]) -> None:
        if event["kind"] == "error":
            errors.append(event)
        else:
            on_event(event)

    on_gpu = job.placement.device == "cuda"
    with tempfile.TemporaryDirectory(prefix="llmft-ray-") as scratch:
        trainer = TorchTrainer(
            rank_main,
            train_loop_config={"job": job.to_json(), "folders": dict(folders), "mailbox": mailbox},
            scaling_config=ScalingConfig(
                num_workers=job.placement.world_size,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": threads(cluster, job), **({"GPU": 1} if on_gpu else {})},
            ),
            run_config=RunConfig(name=job.plan.name, storage_path=str(Path(scratch))),
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=3600),
        )
        reader = MailReader(mailbox, handle)
        reader.start()
        try:
            trainer.fit()
        except (SystemExit, KeyboardInterrupt):
            raise Interrupted("stopped by the user: complete checkpoints are kept, see above") from None
        except Exception as error:
            reader.finish()
            if errors:
                raise LlmftError(f"rank {errors[0]['rank']}: {errors[0]['message']}") from error
            raise LlmftError(f"training failed: {summary_of_failure(error)}; --debug shows all") from error
        finally:
            reader.finish()


def threads(cluster: Cluster, job: Job) -> int:
    """Cores of a worker, as many as Ray lets it have threads: all of a machine that is ours alone."""
    return max(1, cluster.cpus // job.placement.world_size) if cluster.address == "local" else 1


class MailReader(threading.Thread):
    """Takes events out of the mailbox while `fit()` holds the main thread (Ray handles Ctrl-C only there)."""

    def __init__(self, mailbox: Any, handle: OnEvent) -> None:
        super().__init__(name="llmft-mail", daemon=True)
        self.mailbox, self.handle = mailbox, handle
        self.done = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        import ray

        try:
            while not self.done.wait(POLL_SECONDS):
                for event in ray.get(self.mailbox.take.remote()):
                    self.handle(event)
        except BaseException as error:  # noqa: BLE001 - raised again by finish(), in the main thread
            self.failure = error

    def finish(self) -> None:
        """Stop, and handle what is left. May be called twice."""
        import ray

        if self.done.is_set():
            return
        self.done.set()
        self.join()
        if self.failure is not None and not isinstance(self.failure, ray.exceptions.RayError):
            raise self.failure
        if self.failure is None and ray.is_initialized():  # else Ray has gone, and fit() says why
            for event in ray.get(self.mailbox.take.remote(), timeout=30):
                self.handle(event)


def summary_of_failure(error: BaseException) -> str:
    """The last line of the first rank that failed, which is what went wrong."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in failures.items():
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        if lines:
            return f"rank {rank}: {lines[-1]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
