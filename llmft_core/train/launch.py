"""Launching: the only file that knows Ray Train. The plan travels as JSON; events come back through an actor."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from llmft_core.errors import LlmftError, one_line
from llmft_core.train.cluster import Cluster, Node, capacity_problems, nodes_now, without
from llmft_core.train.failures import Watch, how_it_died
from llmft_core.train.job import Job
from llmft_core.train.joining import Joining
from llmft_core.train.mailbox import MailboxReporter, MailReader, OnEvent, open_mailbox
from llmft_core.train.stopping import Lookout, Stop
from llmft_core.values import WorkerRange


def launch(
    job: Job,
    cluster: Cluster,
    folders: Mapping[str, Mapping[str, str]],
    joining: Joining,
    on_event: OnEvent,
    stop: Stop,
) -> None:
    """Train, and return when the last checkpoint is complete. `folders` has each node's copies by node id; `joining`
    is for nodes that are not among them.

    Raises LlmftError when a rank failed, Interrupted after Ctrl-C or SIGTERM: what was complete by then is in it.
    """
    watch = Watch(on_event, job, stop, {node.id: node.host for node in cluster.nodes}, nodes_now)
    try:
        if cluster.address == "":
            train_in_process(job, watch, stop)
        else:
            train_on_ray(job, cluster, folders, joining, watch, stop)
    except KeyboardInterrupt:
        raise stop.interrupted(watch.stopped()) from None
    if stop.asked() and watch.unfinished:
        raise stop.interrupted(watch.stopped())


class CallReporter:
    """Events of a rank in this process."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def send(self, event: dict[str, Any]) -> None:
        self._watch.handle(event)
        if event["kind"] == "hung":  # the thread that would raise an error is the one that hangs
            print(f"llmft: error: {self._watch.hanging()}; {self._watch.kept()}", file=sys.stderr, flush=True)
            os._exit(LlmftError.exit_code)


def train_in_process(job: Job, watch: Watch, stop: Stop) -> None:
    """One rank, here, without a cluster: to debug, and to train on one GPU."""
    import torch
    import torch.distributed as dist

    from llmft_core.train.process_group import end_process_groups
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
        with stop.announced(watch.announce):
            train_rank(job, 0, CallReporter(watch), stop.asked)
    except LlmftError as error:
        error.add_note(watch.kept())
        raise
    finally:
        if dist.is_initialized():
            end_process_groups()
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


def rank_main(config: dict[str, Any]) -> None:
    """The training function that Ray Train calls on every worker."""
    import ray
    import ray.train

    from llmft_core.train.worker import train_rank

    if ray.get(config["mailbox"].is_given_up.remote()):
        return
    node = ray.get_runtime_context().get_node_id()
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    reporter = MailboxReporter(config["mailbox"])
    began = {"rank": rank, "host": socket.gethostname(), "node": node, "world_size": world_size}
    reporter.send({"kind": "rank", **began})
    try:
        again = ray.get(config["mailbox"].begins_again.remote(rank))
        folders = config["folders"].get(node)
        if folders is None:
            folders = config["joining"].folders(node, config["mailbox"])
        job = Job.from_json({**config["job"], **folders}).for_world_size(world_size)
        if config["threads"]:
            take_threads(config["threads"])
        with Lookout(config["mailbox"], reporter.send) if rank == 0 else nullcontext() as lookout:
            train_rank(job, rank, reporter, lookout.asked if lookout is not None else lambda: False, again=again)
    except Exception as error:
        ours = isinstance(error, LlmftError)
        text = one_line(error) if ours else f"{type(error).__name__}: {one_line(error)}"
        reporter.send({"kind": "error", "message": text, "rank": rank, "ours": ours})
        raise
    finally:
        reporter.flush()


def train_on_ray(
    job: Job,
    cluster: Cluster,
    folders: Mapping[str, Mapping[str, str]],
    joining: Joining,
    watch: Watch,
    stop: Stop,
) -> None:
    """Ray Train V2. Its own checkpoints are not used: our marker is the truth, and our uploads are verified."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    mailbox = open_mailbox()
    ours = cluster.address == "local"
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # seconds count there; the default is 5
    if ours:  # nobody takes nodes from it
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    workers = job.plan.worker_range or WorkerRange(job.placement.world_size, job.placement.world_size)
    elastic = workers.fewest != workers.most
    if elastic:  # Ray Train's picture of the cluster is up to 20 s old: it finds out by trying
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")

    joined: set[str] = set()  # node ids

    def handle(event: dict[str, Any]) -> None:
        if event["kind"] != "joined":
            watch.handle(event)
        elif event["node"] not in joined:  # each of its ranks asks, each time it is started
            joined.add(event["node"])
            watch.handle({"kind": "phase", "text": "a node joined: it gets the prepared data and the weights"})
            mailbox.answer.remote(event["node"], joining.send(event["node"], cluster))

    class TellFailures(UserCallback):  # type: ignore[misc]
        """Runs in Ray Train's controller: `fit` says nothing of failures that were survived."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            deaths = {rank: how_it_died(one) for rank, one in sorted(worker_exceptions.items())}
            mailbox.put.remote({"kind": "failed", "deaths": deaths})

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray Train's own aborts at the first Ctrl-C."""
            super()._register_sigint_handler(controller)
            stop.put_before(signal.getsignal(signal.SIGINT))  # type: ignore[arg-type]

        def _create_default_callbacks(self) -> list[Any]:
            """Each of these is a process, a second of a core, and of no use here: there are no Ray datasets, and what a
            lost controller leaves in a Ray of our own ends with it."""
            spared = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if ours else set())
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in spared]

    def announce(text: str) -> None:
        watch.announce(text)
        mailbox.stop.remote()

    on_gpu = job.placement.device == "cuda"
    config = {"job": job.to_json(), "folders": dict(folders), "joining": joining, "mailbox": mailbox}
    with tempfile.TemporaryDirectory(prefix="llmft-ray-") as scratch:
        make_trainer = partial(
            Trainer,
            rank_main,
            train_loop_config={**config, "threads": 0 if ours or not on_gpu else threads_beside_gpus(cluster.nodes)},
            scaling_config=ScalingConfig(
                num_workers=(workers.fewest, workers.most) if elastic else workers.most,
                # Only where workers start anyway: to stop a run for one node more costs what was done since its state.
                elastic_resize_monitor_interval_s=math.inf,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": threads(cluster, job), **({"GPU": 1} if on_gpu else {})},
            ),
            run_config=RunConfig(
                name=job.plan.name,
                storage_path=str(Path(scratch)),
                failure_config=FailureConfig(max_failures=job.plan.max_failures),
                callbacks=[TellFailures()],
            ),
            torch_config=torch_config(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo", max(3600, round(2 * job.plan.step_timeout))
            ),
        )

        def fit() -> None:
            reader = MailReader(mailbox, handle, watch.look)
            reader.start()
            try:
                make_trainer().fit()
            except Exception as error:
                reader.finish()
                raise LlmftError(watch.explained(error)) from error
            finally:
                reader.finish()
                stop.training = False

        try:
            with stop.announced(announce):
                fit()
                while watch.leaving and not stop.asked():
                    check_room(job, cluster, watch)
                    fit()
        except SystemExit:  # Ray Train after Ctrl-C
            raise KeyboardInterrupt from None
        watch.raise_given_up()


def check_room(job: Job, cluster: Cluster, watch: Watch) -> None:
    """Raises LlmftError where the nodes that are not taken away cannot hold the ranks: Ray would wait for ever."""
    for problem in capacity_problems(job.plan, without(cluster, watch.leaving)):
        raise LlmftError(f"{watch.taken()}, and without it {problem.reason}; stopped{watch.stopped()}")


def torch_config(backend: str, timeout: int) -> Any:
    """Ray Train's set-up of the process group, which survives workers that Ray's memory monitor killed: Ray 2.60 asks
    them to leave the group, gets an OutOfMemoryError, which is no RayActorError, and ends the run with
    `max_failures` left. `timeout`: seconds of a collective."""
    from ray.exceptions import OutOfMemoryError
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]
        """What ends with its process need not be left."""

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            with suppress(OutOfMemoryError):
                super().on_shutdown(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc]
        """The same with that backend."""

        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config(backend=backend, timeout_s=timeout)


def threads(cluster: Cluster, job: Job) -> int:
    """Cores of a worker, as many as Ray lets it have threads: all of a machine that is ours alone. Elsewhere one:
    others use cores too, and a worker that asks for more than are free waits for ever."""
    return max(1, cluster.cpus // job.placement.world_size) if cluster.address == "local" else 1


def threads_beside_gpus(nodes: Iterable[Node]) -> int:
    """Threads of a rank on a GPU of a cluster elsewhere, whatever it asked Ray for: a GPU's share of its node's cores,
    on the node where it is smallest, so that all ranks have as many (an offloaded AdamW computes with them)."""
    return max(1, min((node.cpus // node.gpus for node in nodes if node.gpus), default=1))


def take_threads(count: int) -> None:
    """For this thread and those that it starts. Ray has set OMP_NUM_THREADS to the one core that the worker asked for;
    another number is a user's own, and stays."""
    import torch

    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(count)
