"""What ``bigain-fx demo`` measured, as one JSON-ready summary; the tables, the text and the chart are read from it."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bigain_fx.classify import Classification, wilson
from bigain_fx.embedded import NAMES
from bigain_fx.report import Report

COLUMNS = (
    "method", "GFLOPs a call", "ms a call", "speedup", "correct", "accuracy, 95 % interval", "same answer as dense",
    "output deviation", "images, PSNR", "compile",
)  # fmt: skip
ON_SCREEN = (0, 2, 3, 5)
ONNX_COLUMNS = ("ONNX Runtime", "ms a call", "over its dense", "over compiled", "deviation", "export")
TOO_SMALL = "the model is too small to win time by it on this machine"
BUSY = "the timings scatter, as on a busy machine; run it again on an idle one"
SCATTER = 1.25
FULL_SIZE = "These models are tiny. `bigain-fx bench sd2` measures the full-size U-Net of SD 2.0 (random weights)."


@dataclass(frozen=True, eq=False)
class Variant:
    """One denoiser under one method, measured.

    Attributes:
        method: in the text grammar of the methods.
        report: what was done to its attentions.
        compile_seconds: from the model to the end of the first call.
        call_seconds: of the timed calls, one a round.
        output: ``(batch, C, H, W)``, of the first call, whose input all variants of a denoiser share.
        generated: ``(10 * rows, C, H, W)`` in [-1, 1].
        classification: of the held-out digits.
    """

    method: str
    report: Report
    compile_seconds: float
    call_seconds: tuple[float, ...]
    output: Tensor
    generated: Tensor
    classification: Classification


def summarize(
    measured: Mapping[str, Sequence[Variant]],
    onnx: Mapping[str, Sequence[Mapping[str, Any]]],
    labels: Tensor,
    settings: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The content of ``report.json``. Every list begins with dense; ``labels (n,)`` are the truth."""
    models = []
    for name, variants in measured.items():
        rows = [_variant(variant, variants[0], labels) for variant in variants]
        models.append({"name": name, "variants": rows, "onnx": list(onnx[name])})
    return {
        "machine": machine(), "settings": dict(settings), "seconds": seconds, "labels": labels.tolist(),
        "models": models,
    }  # fmt: skip


def _variant(variant: Variant, dense: Variant, labels: Tensor) -> dict[str, Any]:
    predicted = variant.classification.predicted
    correct, total = int((predicted == labels).sum()), len(labels)
    ratios = [base / own for base, own in zip(dense.call_seconds, variant.call_seconds, strict=True)]
    return {
        "method": variant.method,
        "gflops": variant.report.flops_after / 1e9,
        "milliseconds_per_call": 1e3 * statistics.median(variant.call_seconds),
        "speedup": statistics.median(ratios),
        "speedup_quartiles": [float(q) for q in torch.tensor(ratios).quantile(torch.tensor([0.25, 0.75]))],
        "correct": correct,
        "accuracy": correct / total,
        "accuracy_interval": list(wilson(correct, total)),
        "same_as_dense": int((predicted == dense.classification.predicted).sum()),
        "output_db": decibels(dense.output, variant.output, float(dense.output.square().mean())),
        "images_db": decibels(dense.generated, variant.generated, 4.0),
        "compile_seconds": variant.compile_seconds,
        "call_seconds": list(variant.call_seconds),
        "predicted": predicted.tolist(),
        "sites": variant.report.to_dict(),
        "sites_markdown": variant.report.to_markdown(),
    }


def decibels(reference: Tensor, tensor: Tensor, power: float) -> float | None:
    """``10 log10(power / mean squared difference)``; None where there is no difference."""
    error = float((reference - tensor).square().mean())
    return 10 * math.log10(power / error) if error else None


def machine() -> dict[str, Any]:
    """What the times depend on: processor, threads, system, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []  # fmt: skip
    return {
        "processor": names[0].strip() if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


def cells(row: Mapping[str, Any], total: int) -> list[str]:
    """One variant as text, in the order of :data:`COLUMNS`."""
    low, high = row["speedup_quartiles"]
    least, most = row["accuracy_interval"]
    dense = row["method"] == "dense"
    return [
        row["method"],
        f"{row['gflops']:.2f}",
        f"{row['milliseconds_per_call']:.0f}",
        "1" if dense else f"{row['speedup']:.2f}x ({low:.2f} to {high:.2f})",
        f"{row['correct']} of {total}",
        f"{row['accuracy']:.0%} ({least:.0%} to {most:.0%})",
        "-" if dense else f"{row['same_as_dense']} of {total}",
        "-" if row["output_db"] is None else f"{row['output_db']:.1f} dB",
        "-" if row["images_db"] is None else f"{row['images_db']:.1f} dB",
        f"{row['compile_seconds']:.0f} s",
    ]


def onnx_cells(row: Mapping[str, Any]) -> list[str]:
    """One row of ONNX Runtime's as text, in the order of :data:`ONNX_COLUMNS`."""
    return [
        row["method"],
        f"{row['milliseconds_per_call']:.0f}",
        f"{row['speedup']:.2f}x",
        f"{row['over_compiled']:.2f}x",
        "-" if row["output_db"] is None else f"{row['output_db']:.0f} dB",
        f"{row['export_seconds']:.0f} s",
    ]


def verdict(row: Mapping[str, Any]) -> str:
    """One sentence on the time of a compressed variant, from the quartiles of its speedup."""
    low, high = row["speedup_quartiles"]
    speed = f"`{row['method']}` runs at {row['speedup']:.2f}x the speed of dense"
    if low > 1:
        return f"{speed}."
    if high < 1:
        return f"{speed}, slower: {TOO_SMALL}."
    return f"{speed}, no clear difference: {BUSY if high > SCATTER * low else TOO_SMALL}."


def markdown(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """``report.md``; ``pictures`` are file names by model name, and ``"chart"``."""
    settings, total = summary["settings"], len(summary["labels"])
    here = ", ".join(f"{key} {value}" for key, value in summary["machine"].items())
    left_out = [name for name in NAMES if name not in settings["models"]]
    lines = [
        "# bigain-fx demo", "",
        "Embedded denoisers of 32x32 digits, dense and with compressed self-attention, backend "
        f"`{settings['backend']}`{', a quick run without ' + ' and '.join(left_out) if left_out else ''}. "
        f"{10 * settings['rows']} digits are generated from the same noise "
        f"({settings['steps']} DDIM steps, guidance {settings['guidance']:g}); {total} held-out digits are classified "
        f"by denoising error ({settings['pairs']} pairs of timestep and noise each, the same for all classes and "
        f"methods). Seed {settings['seed']}; {summary['seconds']:.0f} s in all.", "",
        f"Machine: {here}.", "",
        f"![accuracy and time]({pictures['chart']})", "",
    ]  # fmt: skip
    for model in summary["models"]:
        variants = model["variants"]
        lines += [f"## {model['name']}", "", _table(COLUMNS, [cells(row, total) for row in variants]), ""]
        lines += [f"- {verdict(row)}" for row in variants[1:]]
        if model["onnx"]:
            lines += ["", _table(ONNX_COLUMNS, [onnx_cells(row) for row in model["onnx"]])]
        lines += ["", f"![digits generated by {model['name']}]({pictures[model['name']]})", ""]
    lines += [
        FULL_SIZE, *([f"No ONNX rows: {settings['no_onnx']}."] if settings["no_onnx"] else []), "",
        "## How to read it", "",
        f"- ms a call: median of {settings['rounds']} calls of {settings['batch']} images, the variants taking turns. "
        "Speedup: median of the ratios to the dense call of the same round, with their quartiles.",
        f"- Accuracy: with {total} digits the Wilson interval is wide; a difference within it is no evidence.",
        "- ONNX Runtime: the exported graph of the same method, timed in the same rounds. Speedup over dense "
        "there, and over the same method compiled, whose output the deviation is from.",
        "- Output deviation: signal to noise of one call against dense, in dB; more is closer. PSNR: of the generated "
        "images, against those of dense.",
        "- `bigain-td` has one constant alpha here, so that one graph generates and classifies; for generation alone "
        "the paper ramps it from 0.8 to 1.2 (`bigain-td:2:0.8..1.2`).", "",
        "## What was done to each attention", "",
    ]  # fmt: skip
    for model in summary["models"]:
        for row in model["variants"]:
            lines += [f"### {model['name']}, {row['method']}", "", row["sites_markdown"]]
    return "\n".join(lines)


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(folder: Path, summary: dict[str, Any], generated: Mapping[str, Sequence[Tensor]]) -> None:
    """Write the report and its pictures; ``generated`` holds, per model, each variant's ``(10 * rows, 1, H, W)``."""
    pictures = {name: f"{name}-digits.png" for name in generated} | {"chart": "accuracy-and-time.png"}
    for model in summary["models"]:
        name, methods = model["name"], [row["method"] for row in model["variants"]]
        digits_figure(name, methods, generated[name]).savefig(folder / pictures[name], dpi=130)
    chart(summary).savefig(folder / pictures["chart"], dpi=130)
    (folder / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(summary, pictures))


def digits_figure(name: str, methods: Sequence[str], generated: Sequence[Tensor]) -> Figure:
    """The generated digits, one panel a method; the same place in each panel started from the same noise."""
    rows = len(generated[0]) // 10
    figure = Figure(figsize=(9, 0.35 + len(methods) * (0.35 + 0.85 * rows)), layout="constrained")
    figure.suptitle(f"{name}: the same noise, each method")
    axes = figure.subplots(len(methods), 1, squeeze=False)[:, 0]
    for axis, method, images in zip(axes, methods, generated, strict=True):
        grid = images[:, 0].unflatten(0, (rows, 10)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        axis.imshow(grid.float().numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(method, loc="left", fontsize=10)
        axis.set_axis_off()
    return figure


def chart(summary: Mapping[str, Any]) -> Figure:
    """Accuracy (with its interval) and time a call of every variant, grouped by model."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, duration = figure.subplots(1, 2)
    models = summary["models"]
    methods = [row["method"] for row in models[0]["variants"]]
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        rows = [model["variants"][index] for model in models]
        places = [place + (index - (len(methods) - 1) / 2) * width for place in range(len(models))]
        shares = [100 * row["accuracy"] for row in rows]
        below = [100 * (row["accuracy"] - row["accuracy_interval"][0]) for row in rows]
        above = [100 * (row["accuracy_interval"][1] - row["accuracy"]) for row in rows]
        accuracy.bar(places, shares, width, yerr=[below, above], capsize=3, label=method)
        bars = duration.bar(places, [row["milliseconds_per_call"] for row in rows], width, label=method)
        duration.bar_label(bars, fmt="%.0f", fontsize=8)
    accuracy.set(title=f"accuracy, %, {len(summary['labels'])} digits, 95 % interval", ylim=(0, 100))
    duration.set(title=f"ms for a call of {summary['settings']['batch']} images")
    for axis in (accuracy, duration):
        axis.set_xticks(range(len(models)), [model["name"] for model in models])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*duration.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), frameon=False)
    return figure


def show(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the tables and what they say of time."""
    total = len(summary["labels"])
    for model in summary["models"]:
        table = Table(*(COLUMNS[index] for index in ON_SCREEN), title=model["name"])
        for row in model["variants"]:
            table.add_row(*(cells(row, total)[index] for index in ON_SCREEN))
        console.print(table)
        for row in model["variants"][1:]:
            console.print(verdict(row), markup=False)
        if model["onnx"]:
            table = Table(*ONNX_COLUMNS)
            for row in model["onnx"]:
                table.add_row(*onnx_cells(row))
            console.print(table)
    console.print(FULL_SIZE, markup=False)
