"""Never slower: ``select="auto"`` against the dense compiled model, over forty shapes.

``python -m bigain_fx.bench.sweep --out bench/results`` takes half an hour on two cores. Every shape is written when it
is done; started again, it goes on from there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console

from bigain_fx import command_line, optimize
from bigain_fx.bench import figure, result, timing
from bigain_fx.compilers import check_works
from bigain_fx.models import check_device
from bigain_fx.passes import checks
from bigain_fx.passes.grammar import parse
from bigain_fx.seeds import seeded
from bigain_fx.stopwatch import interleaved, synchronizer

SIDES, WIDTHS, METHODS = (8, 12, 16, 24, 32, 48, 64), (64, 320, 1152), ("bigain-tm:0.7:window=16", "bigain-td:2")
LAYERS, BATCH, ROUNDS = 2, 2, 15
FLOOR = 0.99
"""What the interval of the ratio has to reach."""


@dataclass(frozen=True)
class Shape:
    """A DiT of :data:`LAYERS` blocks on a square grid."""

    side: int
    width: int
    method: str


@dataclass(frozen=True)
class Row:
    """One shape: times of a call in milliseconds, and the ratio dense over chosen with its 95 % interval."""

    shape: Shape
    rewritten: int
    dense_ms: float
    chosen_ms: float
    ratio: timing.Estimate

    @property
    def holds(self) -> bool:
        """Whether the interval reaches :data:`FLOOR`."""
        return self.ratio.high >= FLOOR


SHAPES = tuple(
    Shape(side, width, method)
    for side in SIDES
    for width in WIDTHS
    for method in METHODS
    if (side, width) != (SIDES[-1], WIDTHS[-1])
)


def measure(shape: Shape, device: torch.device, rounds: int, backend: str) -> Row:
    """Time the dense and the chosen graph of ``shape`` in turns."""
    from diffusers import DiTTransformer2DModel

    with seeded(0, device):
        heads = max(1, shape.width // 64)
        model = DiTTransformer2DModel(
            num_layers=LAYERS, num_attention_heads=heads, attention_head_dim=shape.width // heads,
            sample_size=shape.side, patch_size=1, in_channels=4, out_channels=4,
        )  # fmt: skip
        model = model.eval().requires_grad_(False).to(device)
        inputs = {
            "hidden_states": torch.randn(BATCH, 4, shape.side, shape.side, device=device),
            "timestep": torch.full((BATCH,), 500, device=device),
            "class_labels": torch.zeros(BATCH, dtype=torch.int64, device=device),
        }
    dense = optimize(model, kwargs=inputs, method=(), backend=backend)
    chosen = optimize(model, kwargs=inputs, method=parse(shape.method), backend=backend, select="auto")
    calls = [partial(dense, **inputs), partial(chosen, **inputs)]
    for call in calls:
        timing.check_finite(str(shape), call())
    seconds = interleaved(calls, rounds, synchronizer(device))
    dense_ms, chosen_ms = (1e3 * statistics.median(each) for each in seconds)
    return Row(shape, len(chosen.report.rewritten), dense_ms, chosen_ms, timing.speedup(seconds[0], seconds[1], 0))


def run(
    out: Annotated[Path, typer.Option(help="folder for sweep-DEVICE.json, .md and .png")] = Path("bench/results"),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    rounds: Annotated[int, typer.Option(help="of each shape")] = ROUNDS,
    backend: Annotated[str, typer.Option(help="as for torch.compile")] = "inductor",
    shapes: Annotated[int, typer.Option(help="only the first so many")] = len(SHAPES),
) -> None:
    """Measure every shape that is not there yet, and write the table."""
    check_device(device)
    check_works(backend)
    checks.integer("rounds", rounds, least=1, most=checks.MANY)
    checks.integer("shapes", shapes, least=1, most=len(SHAPES))
    result.prepare(out)
    file = out / f"sweep-{device}.json"
    found = result.rows(file, ("shape", "ratio", "holds"))
    done = {tuple(row["shape"].values()) for row in found["rows"]}
    for shape in SHAPES[:shapes]:
        if tuple(asdict(shape).values()) in done:
            continue
        row = measure(shape, torch.device(device), rounds, backend)
        Console().print(f"{shape.side}x{shape.side}, width {shape.width}, {shape.method}: {row.ratio.median:.3f}")
        found["rows"].append(asdict(row) | {"holds": row.holds})
        found |= {
            "rounds": rounds, "backend": backend, "layers": LAYERS, "batch": BATCH,
            **result.about(torch.device(device), "sweep"),
        }  # fmt: skip
        result.write(file, json.dumps(found, indent=1) + "\n")
    result.write(file.with_suffix(".md"), markdown(found))
    figure.save(draw(found["rows"]), file.with_suffix(".png"))


def markdown(found: dict[str, Any]) -> str:
    """What was found, as a table."""
    rows = found["rows"]
    holding = sum(row["holds"] for row in rows)
    lines = [
        '# `select="auto"` over dense, both compiled', "",
        f"DiTs of {found['layers']} blocks, batch {found['batch']}; the interval reaches {FLOOR} at {holding} of "
        f"{len(rows)} shapes.", "",
        f"{result.place(found)}; {found['rounds']} rounds in turn; {found['date']}; "
        f"`{found['command']}`", "",
        "| grid | width | method | rewritten | dense (ms) | chosen (ms) | dense / chosen [95 %] |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in rows:
        shape, ratio = row["shape"], row["ratio"]
        interval = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" + " **slower**" * (
            not row["holds"]
        )
        lines.append(
            f"| {shape['side']}x{shape['side']} | {shape['width']} | `{shape['method']}` | {row['rewritten']} of "
            f"{found['layers']} | {row['dense_ms']:.2f} | {row['chosen_ms']:.2f} | {interval} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Speed-up over the tokens, with its interval: a panel for each method, a line for each width."""
    drawn = Figure(figsize=(4.2 * len(METHODS), 3.6), layout="constrained")
    for axes, method in zip(drawn.subplots(1, len(METHODS), sharey=True), METHODS, strict=True):
        for width in WIDTHS:
            found = [row for row in rows if (row["shape"]["method"], row["shape"]["width"]) == (method, width)]
            tokens, ratios = [row["shape"]["side"] ** 2 for row in found], [row["ratio"] for row in found]
            ends = [[abs(ratio["median"] - ratio[end]) for ratio in ratios] for end in ("low", "high")]
            medians = [ratio["median"] for ratio in ratios]
            axes.errorbar(tokens, medians, yerr=ends, marker="o", ms=4, capsize=2, label=f"{width} channels")
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.set(xscale="log", title=method, xlabel="tokens", ylabel="speed-up over dense, both compiled")
        axes.set_xticks([side**2 for side in SIDES], [f"{side**2:,}" for side in SIDES], rotation=45)
        axes.minorticks_off()
        axes.grid(color="0.93")
        axes.legend(frameon=False)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    app = typer.Typer(add_completion=False)
    app.command()(run)
    command_line.ending_well(lambda: app(list(arguments) if arguments is not None else None))


if __name__ == "__main__":
    main()
