"""The walk: plan → preflight → prepare data → stage weights → train → checkpoint → report."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llmft_core.catalog import Catalog
from llmft_core.checkpoint.leftovers import sweep
from llmft_core.errors import InputError, Interrupted, LlmftError, Problems
from llmft_core.extensions import Tracker
from llmft_core.head import head, warnings
from llmft_core.loading import load_plugins
from llmft_core.plan import RunPlan
from llmft_core.preflight import cluster_problems, node_problems
from llmft_core.prepare import Ready, keys_of, make_ready
from llmft_core.report import words
from llmft_core.report.keeper import Keeper
from llmft_core.report.live import LiveView
from llmft_core.report.summary import Outcome
from llmft_core.report.trackers import Trackers
from llmft_core.report.transfers import transfer_bar
from llmft_core.resume import DESCRIPTION, Point, check_inputs, fetch_logs, other_numbers, resume_at
from llmft_core.storage.lease import Lease
from llmft_core.storage.places import Place, Places
from llmft_core.storage.transfer import create, write_bytes
from llmft_core.train.aside import put_aside
from llmft_core.train.cluster import Cluster, Node, collected, on_each_node, own_ray, start
from llmft_core.train.job import Job
from llmft_core.train.joining import Joining
from llmft_core.train.launch import launch
from llmft_core.train.mailbox import MailReader, open_mailbox
from llmft_core.train.ship import ship
from llmft_core.train.stopping import Stop
from llmft_core.weights.cache import cache_folder
from llmft_core.weights.share import Sharer, check_same, sharing
from llmft_core.weights.stage import stage_model


def run(plan: RunPlan, catalog: Catalog, *, debug: bool = False, point: Point | None = None) -> Outcome:
    """Train as the plan says, from the beginning or from a point of an earlier run of this name. Raises InputError
    before any rank is started, LlmftError after, Interrupted."""
    before = point.latest_plan if point is not None else None
    with own_ray(plan, debug=debug), Stop() as stop:
        ready = make_ready(plan, catalog, debug=debug, say=lambda text: print(f"… {text}", flush=True), before=before)
        stop.stateless = ready.catalog.create("strategy", ready.plan.strategy or {}).state_problem()
        if point is not None:
            check_inputs(point, ready.job.provenance, ready.job.total_steps)
        view = LiveView(ready.job.total_steps, ready.job.epochs)
        show_head(ready, view)
        if point is not None and (text := other_numbers(point, ready.job)):
            view.warn(text)
        view.phase("starting" if ready.cluster.address == "" else "starting workers")
        cluster = start(ready.cluster, ready.placement.world_size, debug=debug)
        problems = cluster_problems(ready.plan, ready.places, cluster, ready.staged_bytes)
        if problems:
            raise Problems(problems)
        job, folders = stage(ready, cluster, view)
        return train(replace(ready, cluster=cluster, job=job), folders, view, stop, point)


def show_head(ready: Ready, view: LiveView) -> None:
    """The head of a run, and what should be known before money is spent."""
    for label, text in head(ready):
        view.say(f"{label:>12}  {text}")
    for text in warnings(ready):
        view.warn(text)


def stage(ready: Ready, cluster: Cluster, view: LiveView) -> tuple[Job, dict[str, dict[str, str]]]:
    """Weights and data onto every node, once a node. Returns the job with this node's folders, and all by node id."""
    if cluster.address in ("", "local"):  # this machine: no task is needed, and what was prepared is in its cache
        with transfer_bar("weights", view.console) as bar:
            model = stage_model(ready.plan, ready.catalog, ready.places, weights=True, progress=bar)
        return replace(ready.job, model=model.path), {node.id: {} for node in cluster.nodes}
    mailbox = open_mailbox()
    moved: dict[str, tuple[int, int]] = {}  # node → bytes done, bytes in all

    keys = keys_of(ready.job)
    view.phase("sending the prepared data to the nodes")
    ship(cluster, list(keys.values()))
    args = (ready.plan.to_json(), keys, mailbox)
    with transfer_bar(f"weights to {words.counted(len(cluster.working), 'node')}", view.console) as bar:

        def show(event: dict[str, Any]) -> None:
            moved[event["node"]] = (event["done"], event["total"])
            bar(*map(sum, zip(*moved.values(), strict=True)))

        reader = MailReader(mailbox, show)
        reader.start()
        try:
            if ready.plan.weights.share and len(cluster.working) > 1:
                staged = stage_shared(cluster, args, stage_on_node)
            else:
                staged = on_each_node(cluster, stage_on_node, *args)
        finally:
            reader.finish()
    return ready.job, {node.id: folders for node, folders in staged.items()}


def stage_shared(cluster: Cluster, args: tuple[Any, ...], function: Callable[..., Any]) -> dict[Node, Any]:
    """As `on_each_node`, where the nodes take the weights from each other: `function` gets its node's `Sharer` too."""
    nodes = cluster.working
    with sharing([(node.id, node.host) for node in nodes]) as sharers:
        collected({nodes[0]: sharers[0].hold.remote()})
        refs = [sharer.stage.remote(sharers, function, *args) for sharer in sharers]
        staged = collected(dict(zip(nodes, refs, strict=True)))
    check_same({node.host: copy for node, (_, copy) in staged.items()})
    return {node: result for node, (result, _) in staged.items()}


def stage_on_node(
    plan_json: Mapping[str, Any], keys: Mapping[str, str], mailbox: Any | None = None, sharer: Sharer | None = None
) -> dict[str, str]:
    """Runs on a node: fetch the weights into its cache. Its folders: of the model, and of what was sent (`keys`).
    `mailbox`: who is told how far it is."""
    plan = RunPlan.from_json(plan_json)
    catalog = Catalog(load_plugins(plan.disable_plugin))
    places = Places(catalog, plan.storage, plan.backends)
    progress = telling(mailbox) if mailbox is not None else None
    model = stage_model(plan, catalog, places, weights=True, progress=progress, sharer=sharer)
    return {"model": str(model.path), **{name: str(cache_folder() / key) for name, key in keys.items()}}


def joining_of(ready: Ready, target: Place) -> Joining:
    """What nodes get that join later: the checks of preflight, the data and the weights."""
    keys = keys_of(ready.job)
    # The description of the run lies there already: a node that does not see it has another folder than the driver.
    seen = "" if target.backend.shared_by_nodes() else (target / DESCRIPTION).path
    return Joining(partial(prepare_node, ready.plan.to_json(), keys, seen, ready.staged_bytes), list(keys.values()))


def prepare_node(plan_json: Mapping[str, Any], keys: Mapping[str, str], seen: str, staged_bytes: int) -> dict[str, str]:
    """Runs on a node that joined. Raises LlmftError."""
    problems = node_problems(plan_json, seen, staged_bytes)
    if problems:
        raise LlmftError(f"this node joined later, and cannot train: {'; '.join(problems)}")
    return stage_on_node(plan_json, keys)


def train(
    ready: Ready, folders: Mapping[str, Mapping[str, str]], view: LiveView, stop: Stop, point: Point | None = None
) -> Outcome:
    """Claim the run's name in storage, or go on with what is there, and train while its lease is ours."""
    target = ready.places.runs() / ready.plan.name
    described = {**ready.job.provenance, "placement": vars(ready.placement), "total_steps": ready.job.total_steps}
    with Lease(target, view.warn, stop.at_once, dead=point.dead if point is not None else None):
        if point is not None:
            swept = sweep(target)
            for name in swept:
                view.say(f"{name} removed: it was never complete")
            ready = replace(ready, job=replace(ready.job, resume=resume_at(point)))
            return follow(ready, folders, target, view, stop)
        claim(target, (json.dumps(described, indent=2) + "\n").encode())
        return follow(ready, folders, target, view, stop)


def telling(mailbox: Any) -> Callable[[int, int], None]:
    """What tells the driver, once a second, how far this node's transfer is."""
    import ray

    node, told = ray.get_runtime_context().get_node_id(), 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done == total or time.monotonic() - told >= 1:
            told = time.monotonic()
            mailbox.put.remote({"node": node, "done": done, "total": total})

    return progress


def follow(
    ready: Ready, folders: Mapping[str, Mapping[str, str]], target: Place, view: LiveView, stop: Stop
) -> Outcome:
    """Train, follow the events, and keep what the trackers write."""
    trackers_folder = cache_folder() / "trackers"
    trackers_folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{ready.plan.name}-", dir=trackers_folder))
    trackers = Trackers(tracker_list(ready), view.warn)
    keeper = Keeper(folder, target, view.warn)
    started = time.monotonic()
    outcome = Outcome(ready.plan.storage, stepped=started, adapter=ready.share.adapter)

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "phase":
            view.phase(event["text"])
        elif event["kind"] == "warning":
            view.warn(event["text"])
        elif event["kind"] == "unpublished":
            outcome.unpublished.append(event["name"])
            view.warn(event["text"])
        elif event["kind"] == "hung":
            if ready.cluster.address == "":
                view.progress.stop()  # this process is about to end: the terminal gets its cursor back
            name = f"step_{event['step']:05d}_hung_rank_{event['rank']:05d}.txt"
            uri = put_aside(target, view.warn)(name, event["stack"].encode())
            view.warn(
                f"rank {event['rank']} does not get on in {event['doing']} of optimizer step {event['step']}: {uri}"
            )
        elif event["kind"] == "stopping":
            view.say(event["text"])
        elif event["kind"] == "restarted":
            view.warn(restart_line(outcome, event["step"]))
            trackers.finish()
            trackers.resume(folder, ready.plan.to_json(), event["step"])
        elif event["kind"] == "metrics":
            note(outcome, event)
            view.metrics(event["step"], event["epoch"], event["metrics"])
            trackers.log(event["metrics"], event["step"])
        elif event["kind"] == "removed":
            outcome.checkpoints = [kept for kept in outcome.checkpoints if kept["name"] != event["name"]]
            view.say(f"{event['name']} removed: --checkpoint.keep-last and keep-best keep others")
        elif event["kind"] == "stall":
            outcome.stalled += event["seconds"]
            outcome.waited += event["waited"]
        elif event["kind"] == "state":
            keeper.soon()
            outcome.lately = [(done, seconds) for done, seconds in outcome.lately if done > event["step"]]
            view.say(
                f"{event['name']} complete: {words.size(event['bytes'])} verified and uploaded in "
                f"{words.duration(event['seconds'])}: `llmft resume {target.uri}` goes on from it"
            )
        elif event["kind"] == "checkpoint":
            outcome.checkpoints.append(event)
            view.checkpoint(event)

    if ready.job.resume is not None:
        fetch_logs(target, folder)
        trackers.resume(folder, ready.plan.to_json(), ready.job.resume.step)
    else:
        trackers.start(folder, ready.plan.to_json())
    try:
        with keeper:
            try:
                with view:
                    launch(ready.job, ready.cluster, folders, joining_of(ready, target), on_event, stop)
            except BaseException as error:
                trackers.break_off(by_user=isinstance(error, Interrupted | KeyboardInterrupt))
                raise
            trackers.finish()
    finally:
        outcome.seconds = time.monotonic() - started
    return outcome


def restart_line(outcome: Outcome, step: int) -> str:
    """What a failure cost, which is kept for the summary too."""
    lost = [seconds for done, seconds in outcome.lately if done > step]
    outcome.lately.clear()
    outcome.restarts += 1
    outcome.lost_steps += len(lost)
    outcome.lost_seconds += sum(lost)
    outcome.stands = True
    return (
        f"the workers were started again and go on after optimizer step {step}: "
        f"{words.counted(len(lost), 'step')} of {words.duration(sum(lost))} are done again"
    )


def claim(target: Place, described: bytes) -> None:
    """Write plan.json, which makes the name this run's. Where the store can, only one of two runs that come at once
    gets it; raises InputError in the other. Elsewhere preflight's look is all there is."""
    if not target.backend.creates_exclusively:
        write_bytes(target / "plan.json", described)
    elif not create(target / "plan.json", described):
        raise InputError(f"name: {target.uri} was taken by another run in this moment: choose another --name")


def note(outcome: Outcome, event: Mapping[str, Any]) -> None:
    """Keep what the summary tells."""
    metrics = event["metrics"]
    outcome.first_loss = outcome.first_loss if outcome.first_loss is not None else metrics["train/loss"]
    outcome.last_loss = metrics["train/loss"]
    outcome.steps = event["step"]
    if metrics["train/skipped"]:
        outcome.skipped.add(event["step"])
    outcome.step_seconds[event["publishing"]].append(metrics["train/step_seconds"])
    outcome.data_seconds += metrics["train/data_seconds"]
    outcome.lately.append((event["step"], metrics["train/step_seconds"]))
    now = time.monotonic()
    if outcome.stands:
        outcome.stood += max(0.0, now - outcome.stepped - metrics["train/step_seconds"])
        outcome.stands = False
    outcome.stepped = now


def tracker_list(ready: Ready) -> list[Tracker]:
    """The plan's trackers."""
    return [ready.catalog.create("tracker", choice) for choice in ready.plan.tracker]
