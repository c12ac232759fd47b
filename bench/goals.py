"""What the yardstick is to reach, and how far each measured run gets: the goals in ``speed.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bigain_fx.bench import timing
from bigain_fx.bench.rows import DENSE, TOMESD

Result = Mapping[str, Any]
Measured = Callable[[Result, Mapping[str, Any]], timing.Estimate | None]

MERGING, DOWNSAMPLING, BLOCK = "bigain-tm:0.7:window=16", "bigain-td:2", "bigain-tm:0.7:block:window=16"
HEAD = (
    "Of runs from 1,024 tokens on. Reached is by the median; *within the interval*: only its upper end is that high.\n"
    "A thousandth more memory than dense, as the integers of a plan take, counts as none.\n\n"
    "| goal | at least | run | row | measured | reached |\n"
    "| --- | ---: | --- | --- | ---: | --- |\n"
)


def over_tomesd(found: Result, row: Mapping[str, Any]) -> timing.Estimate | None:
    """How many times faster ``row`` is than tomesd compiled; None where that is not there or merges otherwise.

    Rows that merge as much share a bound.
    """
    for peer in found["rows"]:
        if peer["name"].startswith(TOMESD) and peer["bound"] is not None and peer["bound"] == row["bound"]:
            return None if peer is row else timing.speedup(peer["seconds"], row["seconds"], found["seed"])
    return None


def efficiency(found: Result, row: Mapping[str, Any]) -> timing.Estimate | None:
    """Of the free bound; None where that does not tell from dense."""
    return row["efficiency"] and timing.Estimate(**row["efficiency"])


def over_dense(found: Result, row: Mapping[str, Any]) -> timing.Estimate | None:
    """How many times faster ``row`` is than the dense compiled model."""
    return timing.Estimate(**row["speedup"])


def memory(found: Result, row: Mapping[str, Any]) -> timing.Estimate | None:
    """Peak memory of the dense compiled model over that of ``row``; None under CUDA graphs, whose pool is not seen."""
    if found["mode"] is not None:
        return None
    dense = next((each["peak_bytes"] for each in found["rows"] if each["name"] == DENSE), None)
    return timing.Estimate(*[dense / row["peak_bytes"]] * 3) if dense and row["peak_bytes"] else None


@dataclass(frozen=True)
class Goal:
    """What a row is to reach: in each suite at least so much, in the runs of ``workloads``, or in all."""

    what: str
    row: str
    measured: Measured
    least: Mapping[str, float]
    workloads: tuple[str, ...] = ()

    def applies(self, found: Result) -> bool:
        """Whether it is about this run: those of at least 1,024 tokens, of these workloads."""
        name = found["workload"]
        side = next(iter(found["inputs"].values()))[-1]
        ours = not self.workloads or {name, f"{name}@{side}", name.partition("-")[0]} & {*self.workloads}
        return bool(ours) and (found["tokens"] or 0) >= 1024


WHOLE = 0.999
"""The integer maps of a plan, less than a thousandth, are not held against its memory."""
GOALS = (
    Goal("efficiency, merging", MERGING, efficiency, {"cpu": 0.95, "gpu": 0.90}),
    Goal("efficiency, downsampling", DOWNSAMPLING, efficiency, {"cpu": 0.97, "gpu": 0.95}),
    Goal("over tomesd, compiled", MERGING, over_tomesd, {"cpu": 1.15, "gpu": 1.3}, ("sd2",)),
    Goal("over dense, merging", MERGING, over_dense, {"cpu": 1.3}, ("sd2@96",)),
    Goal("over dense, block scope", BLOCK, over_dense, {"cpu": 2.0}, ("dit-xl-2@64",)),
    Goal("over dense, merging", MERGING, over_dense, {"gpu": 1.15}, ("sdxl@128",)),
    Goal("over dense, an MMDiT", BLOCK, over_dense, {"gpu": 1.3}, ("sd3", "flux")),
    Goal("peak memory, dense over ours", MERGING, memory, {"cpu": WHOLE, "gpu": WHOLE}),
    Goal("peak memory, dense over ours", DOWNSAMPLING, memory, {"cpu": WHOLE, "gpu": WHOLE}),
)


def to_markdown(suite: str, results: Iterable[Result], title: Callable[[Result], str]) -> str:
    """A line for each goal of ``suite`` and run that it is about; empty where there are none."""
    lines = [
        _line(goal, goal.least[suite], found, row, title(found))
        for goal in GOALS
        if suite in goal.least
        for found in results
        if goal.applies(found)
        for row in found["rows"]
        if row["name"] == goal.row
    ]
    return HEAD + "".join(lines) if lines else ""


def _line(goal: Goal, least: float, found: Result, row: Mapping[str, Any], title: str) -> str:
    value = goal.measured(found, row)
    if value is None:
        text, reached = "-", "no bound, or within noise of dense" if goal.measured is efficiency else "not measured"
    else:
        spread = "" if value.low == value.high else f" ({value.low:.2f} to {value.high:.2f})"
        text = f"{value.median:.2f}{spread}"
        reached = "yes" if value.median >= least else "within the interval" if value.high >= least else "no"
    return f"| {goal.what} | {least:.2f} | {title} | `{row['name']}` | {text} | {reached} |\n"
