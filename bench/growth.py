"""How deciding which tokens merge grows with their number: ``python -m bigain_fx.bench.growth --out bench/results``.

The plan alone, compiled, from one to sixty-four thousand tokens: matched over the whole grid, and in windows.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console

from bigain_fx import command_line
from bigain_fx.bench import figure, result
from bigain_fx.compilers import check_works
from bigain_fx.models import check_device
from bigain_fx.passes import checks
from bigain_fx.passes.ops import window_sides
from bigain_fx.stopwatch import interleaved, synchronizer

SIDES, WINDOWS = (32, 48, 64, 96, 128, 192, 256), (None, 16, 8)
CHANNELS, RATIO, CELL = 320, 0.7, (2, 2)


def measure(side: int, device: torch.device, rounds: int, backend: str) -> list[float]:
    """Seconds of one plan on ``side x side`` tokens, the median of ``rounds`` in turns, for each of :data:`WINDOWS`."""
    metric = torch.randn(1, side**2, CHANNELS, generator=torch.Generator().manual_seed(0)).to(device)
    grid, folded = (side, side), int(side**2 * RATIO)
    torch.compiler.reset()  # else torch gives up compiling so many variants of one function
    calls = []
    for window in WINDOWS:
        decide = partial(
            torch.ops.bigain.merge_plan, grid=grid, cell=CELL, merged=folded, window=window_sides(grid, CELL, window)
        )
        calls.append(partial(torch.compile(decide, fullgraph=True, dynamic=False, backend=backend), metric))
    with torch.no_grad():
        return [statistics.median(seconds) for seconds in interleaved(calls, rounds, synchronizer(device))]


def exponents(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Between each size and the next, for each of :data:`WINDOWS`: 1 is linear in the tokens, 2 is quadratic."""
    return [
        [
            math.log(after / before) / math.log(larger["tokens"] / smaller["tokens"])
            for before, after in zip(smaller["seconds"], larger["seconds"], strict=True)
        ]
        for smaller, larger in pairwise(rows)
    ]


def names() -> list[str]:
    """Of :data:`WINDOWS`."""
    return ["whole grid" if window is None else f"window={window}" for window in WINDOWS]


def markdown(found: Mapping[str, Any]) -> str:
    """What was found, as a table; in parentheses the exponent from the size before."""
    lines = [
        "# What deciding costs, by the number of tokens", "",
        f"One plan: batch 1, {CHANNELS} channels, ratio {RATIO:g}, float32, compiled, in milliseconds, "
        "and in parentheses the exponent of growth from the size before (1: linear, 2: quadratic).", "",
        f"{result.place(found)}; {found['rounds']} rounds in turn; {found['date']}; "
        f"`{found['command']}`", "",
        f"| tokens | {' | '.join(names())} |", f"| ---: |{' ---: |' * len(WINDOWS)}",
    ]  # fmt: skip
    growth = [None, *exponents(found["rows"])]
    for row, powers in zip(found["rows"], growth, strict=True):
        cells = [f"{1e3 * seconds:.2f}" for seconds in row["seconds"]]
        if powers:
            cells = [f"{cell} ({power:.2f})" for cell, power in zip(cells, powers, strict=True)]
        lines.append(f"| {row['tokens']:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![milliseconds over tokens](growth-" + found["device"] + ".png)", ""])


def draw(found: Mapping[str, Any]) -> Figure:
    """Milliseconds over tokens, both logarithmic, with a line that is linear."""
    drawn = Figure(figsize=(5, 3.6), layout="constrained")
    axes = drawn.subplots()
    tokens = [row["tokens"] for row in found["rows"]]
    for name, seconds in zip(names(), zip(*(row["seconds"] for row in found["rows"]), strict=True), strict=True):
        axes.plot(tokens, [1e3 * each for each in seconds], "o-", ms=4, label=name)
    first = 1e3 * found["rows"][0]["seconds"][-1]
    axes.plot(tokens, [first * count / tokens[0] for count in tokens], "--", color="0.6", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="plan (ms)")
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=45, minor=False)
    axes.minorticks_off()
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    return drawn


def main(
    out: Annotated[Path, typer.Option(help="folder for growth-DEVICE.json, .md and .png")] = Path("bigain-bench"),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    rounds: Annotated[int, typer.Option(help="of each size")] = 9,
    backend: Annotated[str, typer.Option(help="as for torch.compile")] = "inductor",
    sizes: Annotated[int, typer.Option(help="only the first so many")] = len(SIDES),
) -> None:
    """Time the plan at every size, and write the table and the figure."""
    check_device(device)
    check_works(backend)
    checks.integer("rounds", rounds, least=1, most=checks.MANY)
    checks.integer("sizes", sizes, least=1, most=len(SIDES))
    result.prepare(out)
    about = result.about(torch.device(device), "growth")
    rows: list[dict[str, Any]] = []
    for side in SIDES[:sizes]:
        rows.append({"tokens": side**2, "seconds": measure(side, torch.device(device), rounds, backend)})
        Console().print(f"{side**2} tokens: " + ", ".join(f"{1e3 * seconds:.2f} ms" for seconds in rows[-1]["seconds"]))
    found = {
        "device": device, "rounds": rounds, "backend": backend, "windows": WINDOWS, "channels": CHANNELS, **about,
        "rows": rows,
    }  # fmt: skip
    file = out / f"growth-{device}.json"
    result.write(file, json.dumps(found, indent=1) + "\n")
    result.write(file.with_suffix(".md"), markdown(found))
    figure.save(draw(found), file.with_suffix(".png"))


if __name__ == "__main__":
    command_line.run(main)
