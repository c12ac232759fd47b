"""Speed-up against the number of tokens: a panel for each workload, a line for each row that there is."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bigain_fx.bench.result import plain
from bigain_fx.bench.speed import Result, title

LINES = {
    "bound:merge:0.7": ("free bound of merging 0.7", "0.6", "--"),
    "bound:merge:0.7:block": ("free bound of its block scope", "0.3", ":"),
    "bigain-tm:0.7": ("merging 0.7", "tab:blue", "-"),
    "bigain-tm:0.7:window=16": ("merging 0.7, in windows", "tab:purple", "-"),
    "bigain-tm:0.7:block:window=16": ("merging 0.7, in windows, block scope", "tab:cyan", "-"),
    "bigain-td:2": ("keys and values by 2", "tab:green", "-"),
    "tome:0.7": ("ToMe 0.7 on our graph", "tab:orange", "-"),
    "tomesd:0.7": ("tomesd 0.7, compiled", "tab:red", "-"),
}
"""Label, colour and style of each row that is drawn."""
COLUMNS = 3


def draw(results: Sequence[Result]) -> Figure:
    """The figure of ``results``, which are not empty: those of one workload, dtype and mode share a panel."""
    panels: dict[str, list[Result]] = defaultdict(list)
    for found in results:
        panels[title(found)].append(found)
    across, down = min(len(panels), COLUMNS), math.ceil(len(panels) / COLUMNS)
    figure = Figure(layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    drawn: dict[str, Any] = {}
    for (name, shared), panel in zip(panels.items(), axes, strict=False):
        drawn |= _panel(panel, name, shared)
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    labels = [label for label, _, _ in LINES.values() if label in drawn]
    figure.legend([drawn[label] for label in labels], labels, loc="outside lower center", ncols=across, frameon=False)
    figure.set_size_inches(4 * across, 3.2 * down + 0.22 * math.ceil(len(labels) / across))
    return figure


def _panel(panel: Axes, name: str, results: Sequence[Result]) -> dict[str, Any]:
    """Draw one workload; what the legend shows, by label."""
    drawn: dict[str, Any] = {}
    for shift, (row_name, (label, colour, style)) in enumerate(LINES.items()):
        points = sorted(
            (found["tokens"], *(row["speedup"][key] for key in ("median", "low", "high")))
            for found in results if found["tokens"] for row in found["rows"] if plain(row["name"]) == row_name
        )  # fmt: skip
        if points:
            tokens, median, low, high = zip(*points, strict=True)
            apart = [n * 1.012 ** (shift - len(LINES) / 2) for n in tokens]  # intervals beside one another
            ends = [
                [m - a for m, a in zip(median, low, strict=True)],
                [b - m for m, b in zip(median, high, strict=True)],
            ]
            drawn[label] = panel.errorbar(apart, median, yerr=ends, color=colour, linestyle=style, marker="o", ms=4,
                                          capsize=2, label=label)  # fmt: skip
    ticks = {found["tokens"]: f"{found['tokens']:,}\nbatch {_batch(found)}" for found in results if found["tokens"]}
    panel.set_xscale("log")
    panel.set_xticks(list(ticks), list(ticks.values()))
    if ticks:
        panel.set_xlim(min(ticks) / 1.3, max(ticks) * 1.3)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.axhline(1, color="0.8", linewidth=0.8, zorder=0)
    panel.set(title=name, xlabel="tokens of the finest grid", ylabel="speed-up over dense compiled")
    return drawn


def _batch(found: Result) -> int:
    shape: list[int] = next(iter(found["inputs"].values()))
    return shape[0]


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path`` (PNG) all at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
