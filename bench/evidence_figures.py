"""The figures of docs/evidence.md, from the result files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bigain_fx.bench.evidence_document import BETTER, Results, rows_of, swept
from bigain_fx.bench.result import plain
from bigain_fx.evidence.summary import Row

RATIOS = {
    "tome:{}": ("ToMe", "tab:orange", "-"),
    "bigain-tm:{}": ("the paper", "tab:blue", "-"),
    "bigain-tm:{}" + BETTER: ("with proportional attention and blending", "tab:cyan", "-"),
    "calibrated bigain-tm:{}": ("and calibrated", "tab:purple", "--"),
}
"""Label, colour and style of each row that is drawn over its ratio."""
ALPHA = re.compile(r"bigain-td:(\d+):(-?\d+(?:\.\d+)?)|todo:(\d+)")
FACTORS = {2: "tab:blue", 4: "tab:green"}


def overview(found: Results) -> Figure:
    """Accuracy of the main methods, a panel for each denoiser."""
    mains = {name.removesuffix("-main"): result for name, result in found.items() if name.endswith("-main")}
    figure = Figure(figsize=(3.4 * max(1, len(mains)) + 1.4, 3.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(mains)), sharey=True, squeeze=False)[0]
    for axes, (model, result) in zip(panels, mains.items(), strict=False):
        rows = rows_of(result)
        for place, row in enumerate(rows):
            colour = "0.3" if row.against is None else "tab:blue" if "bigain" in row.method else "tab:orange"
            axes.plot([100 * row.low, 100 * row.high], [place, place], color=colour)
            axes.plot(100 * row.accuracy, place, "o", color=colour)
        axes.axvline(100 / result["classes"], color="0.7", linestyle=":")
        axes.set_yticks(range(len(rows)), [row.method for row in rows])
        axes.set(title=model, xlabel="accuracy, %", xlim=(0, 100))
        axes.grid(axis="x", color="0.9")
    panels[0].invert_yaxis()
    return figure


def sweeps(found: Results) -> Figure:
    """Accuracy over the ratio (above) and over a constant alpha (below), a column for each denoiser."""
    models = swept(found)
    across = max(1, len(models))
    figure = Figure(figsize=(4 * across + 0.6, 6.4), layout="constrained")
    panels = figure.subplots(2, across, sharey="col", squeeze=False)
    for (above, below), model in zip(panels.T, models, strict=False):
        if (merging := found.get(f"{model}-merging")) is not None:
            _over_ratio(above, merging)
        if (downsampling := found.get(f"{model}-downsampling")) is not None:
            _over_alpha(below, downsampling)
        above.set(title=model, xlabel="ratio that merges", ylabel="accuracy, %")
        below.set(xlabel="alpha (0: mean, 1: nearest)", ylabel="accuracy, %")
    for axes in panels.flat:
        axes.set_ylim(0, 100)
        axes.grid(color="0.93")
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _over_ratio(axes: Axes, result: Mapping[str, Any]) -> None:
    rows = {row.method: row for row in rows_of(result)}
    for form, (label, colour, style) in RATIOS.items():
        pattern = re.compile(re.escape(form).replace(r"\{\}", r"([\d.]+)"))
        found = {float(match[1]): row for name, row in rows.items() if (match := pattern.fullmatch(plain(name)))}
        _line(axes, found, label, colour, style)
    axes.axhline(100 * rows["dense"].accuracy, color="0.5", linewidth=1, label="dense")


def _over_alpha(axes: Axes, result: Mapping[str, Any]) -> None:
    rows = {row.method: row for row in rows_of(result)}
    matches = {name: match for name in rows if (match := ALPHA.fullmatch(name))}
    for factor, colour in FACTORS.items():
        found = {
            float(match[2] or 1): rows[name]
            for name, match in matches.items() if int(match[1] or match[3]) == factor
        }  # fmt: skip
        _line(axes, found, f"{factor**2} times fewer keys", colour, "-")
    axes.axhline(100 * rows["dense"].accuracy, color="0.5", linewidth=1, label="dense")


def _line(axes: Axes, found: Mapping[float, Row], label: str, colour: str, style: str) -> None:
    if found:
        places = sorted(found)
        low, high = ([100 * getattr(found[place], end) for place in places] for end in ("low", "high"))
        accuracy = [100 * found[place].accuracy for place in places]
        axes.fill_between(places, low, high, color=colour, alpha=0.1, linewidth=0)
        axes.plot(places, accuracy, color=colour, linestyle=style, marker="o", ms=4, label=label)
