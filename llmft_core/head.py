"""What a run will do, before it does it: the head of `llmft run` and the answer of `llmft plan`."""

from __future__ import annotations

from llmft_core.data.prepare import PreparedData, SplitReport
from llmft_core.prepare import Ready
from llmft_core.report import words
from llmft_core.train.schedule import learning_rate

RANDOM_MODEL = "llama-2-tiny"


def head(ready: Ready) -> list[tuple[str, str]]:
    """(label, text) lines."""
    plan, placement, job, report = ready.plan, ready.placement, ready.job, ready.data.report
    first = ready.first_epoch
    where = {"": "this process", "local": "Ray on this machine"}.get(ready.cluster.address, ready.cluster.address)
    between = f" of {plan.workers}" if isinstance(plan.workers, str) else ""
    unit = "GPU" if placement.device == "cuda" else "CPU"
    packed = plan.data.packing != "none"
    together = f"{first.samples / first.packed_rows:.1f} rows in one"
    packing = f", {together}" if packed else ""
    if not packed and first.packed_padding < first.padding:
        packing = f" (--data.packing best-fit: {words.share(first.packed_padding)}, {together})"
    left_out = f"; {words.counted(first.left_out, 'row')} of an epoch left out" if first.left_out else ""
    lines = [
        ("run", plan.name),
        (
            "model",
            f"{plan.model.name} ({ready.model.family.name}), {words.count(ready.size.parameters)} parameters, "
            f"{placement.precision}, method {plan.method['name']}{trained_text(ready)}",
        ),
        (
            "workers",
            f"{placement.world_size}{between} on {unit}, {where}, strategy {(plan.strategy or {})['name']}",
        ),
    ]
    for name, split in report.splits.items():
        lines.append((f"{name} rows", rows_text(split, plan.context_length)))
    lines += [
        (
            "batch",
            f"{words.counted(placement.global_batch, 'packed row' if packed else 'row')} = "
            f"{words.counted(placement.world_size, 'worker')} × {placement.micro_batch} (micro-batch) × "
            f"{placement.accumulation} (accumulation), {words.share(first.padding)} padding{packing}{left_out}",
        ),
        (
            "steps",
            f"{words.counted(job.total_steps, 'optimizer step')} = {job.epochs:.2f} epochs of "
            f"{words.counted(job.steps_per_epoch, 'step')}, about {words.count(job.epochs * first.tokens)} tokens",
        ),
        (
            "rate",
            "learning rate at 0/25/50/75/100 %: " + " ".join(f"{rate:.2e}" for rate in rates(ready)),
        ),
        (
            "writes",
            f"{(ready.places.runs() / plan.name).uri}: {'adapters' if ready.share.adapter else 'checkpoints'} of "
            f"{words.size(ready.checkpoint_bytes)}",
        ),
    ]
    return lines


def trained_text(ready: Ready) -> str:
    """What is trained, where that is not everything."""
    if ready.share.trained >= ready.size.parameters and not ready.share.adapter:
        return ""
    share = ready.share.trained / ready.size.parameters
    return f": {words.count(ready.share.trained)} trained ({words.share(share)}), the model itself frozen"


def rows_text(split: SplitReport, context_length: int) -> str:
    """The rows of a split in one line."""
    lost = f"; {words.count(split.bad)} set aside" if split.bad else ""
    lost += f"; {words.count(split.dropped)} dropped" if split.dropped else ""
    lost += f"; {words.count(split.cut)} cut" if split.cut else ""
    trained = words.share(split.trained_tokens / max(1, split.tokens))
    return (
        f"{words.count(split.rows)} of {words.count(split.rows_read)}{lost} · {words.count(split.tokens)} tokens, "
        f"{trained} trained, longest {split.longest} of {context_length}"
    )


def data_warnings(data: PreparedData) -> list[str]:
    """What looks wrong in the rows, and where those lie that cannot be used."""
    bad = data.report.bad_rows.total
    are = "is" if bad == 1 else "are"
    aside = [f"{words.counted(bad, 'row')} cannot be used and {are} set aside: {data.quarantine}"] if bad else []
    return [*aside, *map(str, data.report.findings())]


def rates(ready: Ready) -> list[float]:
    """The learning rate at five points of the run."""
    total = ready.job.total_steps
    return [learning_rate(ready.plan, round(part * (total - 1)), total) for part in (0, 0.25, 0.5, 0.75, 1)]


def warnings(ready: Ready) -> list[str]:
    """What a user should know before money is spent."""
    found = data_warnings(ready.data)
    if ready.plan.model.name == RANDOM_MODEL:
        costly = ready.placement.device == "cuda" or ready.cluster.address not in ("", "local")
        found.append(
            f"{RANDOM_MODEL} is a RANDOM TINY model to try llmft with; it cannot learn to reason"
            + (
                ": YOU ARE ABOUT TO SPEND A REAL CLUSTER ON IT: give --model"
                if costly
                else "; --model chooses a real one"
            )
        )
    if ready.plan.weights.share and len(ready.cluster.working) < 2:
        found.append("--weights.share does nothing here: one node has nobody to share with")
    if ready.plan.warmup_steps >= ready.job.total_steps:
        found.append(
            f"--warmup-steps {ready.plan.warmup_steps} is not less than the run's "
            f"{words.counted(ready.job.total_steps, 'optimizer step')}: the learning rate never reaches its peak"
        )
    if ready.data.test is None:
        found.append("no test split: nothing will be evaluated; --data.validation-fraction 0.05 keeps some rows for it")
    return found
