"""Which rank hangs: when one does, all others soon wait for it, and their watchdogs report them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def hanging(reports: Sequence[dict[str, Any]], ranks: Iterable[int], named: Callable[[int], str]) -> str:
    """The ranks that hang and what they are at, then those that waited; "" without reports. `reports` are the ranks'
    `hung` events, `ranks` all that are known, `named` a rank in words.

    The rank that hangs is the one with the fewest stages behind it; of several, one that is not in a collective. Where
    all that reported wait, it is one that could not even report.
    """
    if not reports:
        return ""
    silent = sorted(set(ranks) - {report["rank"] for report in reports})
    first = min((report["stage"], report["waiting"]) for report in reports)
    least = [report for report in reports if (report["stage"], report["waiting"]) == first]
    others = [report for report in reports if report not in least]
    if not first[1]:
        said = f"{', '.join(doing(report, named) for report in least)}"
        said += f"; {', '.join(named(report['rank']) for report in others)} waited for it" if others else ""
    else:
        gone = f"{', '.join(map(named, silent))} did not even report: the process or its machine stands still"
        said = f"{gone}; " if silent else "all wait for each other: the network between them may be broken; "
        said += f"waiting: {', '.join(doing(report, named) for report in reports)}"
    return (
        f"{said}; not a stage further in {reports[0]['seconds']:.0f} s (--step-timeout): the stacks of all threads are "
        "in the run's folder `aside`; if it is only slow, give --step-timeout more"
    )


def doing(report: dict[str, Any], named: Callable[[int], str]) -> str:
    """One report in words."""
    verb = "is" if report["waiting"] else "hangs"
    return f"{named(report['rank'])} {verb} in {report['doing']} of optimizer step {report['step']}, at {report['at']}"
