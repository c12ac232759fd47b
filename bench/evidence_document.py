"""docs/evidence.md, written from the result files: every number in it is one of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigain_fx.bench.result import plain
from bigain_fx.evidence.summary import Row, to_table

Results = Mapping[str, Mapping[str, Any]]
EAGER = "dense, eager"
BETTER = ":proportional=true:unmerge=blend"
"""What is not in the paper."""
CLAIMS = (
    ("bigain-tm:0.7", "Merging 70 % of the tokens: destinations by the Laplacian against ToMe's"),
    (
        "bigain-tm:0.7:proportional=true:unmerge=blend",
        "The same with proportional attention and blended unmerging, which are not in the paper",
    ),
    (
        "calibrated bigain-tm:0.7",
        "The same with the cell and the ratios that `bigain_fx.calibrate` finds, at no more work",
    ),
    ("bigain-td:2:0.9", "Keys and values 4 times fewer: the paper's alpha, 0.9, against ToDo (alpha 1)"),
    ("bigain-td:2:0", "The same with alpha 0, average pooling"),
)
WHAT = {
    "dense": "the model as it is",
    "tome:0.7": "70 % of the tokens merge into random ones (ToMe)",
    "bigain-tm:0.7": "into the smoothest of each cell (the paper)",
    "bigain-tm:0.7:proportional=true:unmerge=blend": "with proportional attention and blended unmerging (ours)",
    "calibrated bigain-tm:0.7": "and the cell and the ratios that `calibrate` finds (ours)",
    "todo:2": "4 times fewer keys and values, the nearest of each block (ToDo)",
    "bigain-td:2:0.9": "nearest and mean, mixed 9 to 1 (the paper)",
    "bigain-td:2:0": "the mean of each block",
}
HIGH = 0.375
"""Cycles per token: what lies above is the top quarter of the frequencies."""
STUDIES = {"merging": "Merging", "downsampling": "Downsampling keys and values"}


def text(found: Results, figures: Path, reading: str = "") -> str:
    """The document.

    Args:
        found: result files by model and study, such as ``photo-dit-main``.
        figures: the folder of the figures, relative to the document.
        reading: what we make of it, written by hand.
    """
    models = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in found))
    mains = {model: found[f"{model}-main"] for model in models if f"{model}-main" in found}
    lines = [
        "# Evidence", "",
        "Does a compressed denoiser still classify, and does it still generate? Measured on the small denoisers that "
        "ship with the package, on images held out from their training: digits of MNIST, and patches of photographs, "
        "each of which is a class (the right halves; the left ones were trained on). Large models may behave "
        "otherwise: `bigain-fx evaluate` measures yours. Where a merge names no window it is over the whole grid, "
        "which was the default when these were measured.", "",
        "Every number and figure is made by `python -m bigain_fx.bench.evidence`, which goes on where it was stopped; "
        "what we make of them is written by hand.", "",
    ]  # fmt: skip
    if mains:
        lines += [f"Accuracy has its 95 % interval; chance is {_chances(mains)}. FID: lower is better.", ""]
        lines += [_overview(mains), f"![accuracy of every method on every denoiser]({figures / 'overview.png'})", ""]
        lines += [*reading.splitlines(), "## Verdicts, claim by claim", "", *_claims(mains), *_times(mains)]
    if swept(found):
        lines += ["## Over the ratio, and over alpha", "", f"![accuracy over both]({figures / 'sweeps.png'})", ""]
    for study, title in STUDIES.items():
        for model in models:
            if (result := found.get(f"{model}-{study}")) is not None:
                file = figures / f"{model}-{study}.json"
                lines += [f"## {title}: {model}", "", f"[{_count(result)}]({file})", "", to_table(rows_of(result))]
                lines += [f"![{title}]({file.with_suffix('.png')})", ""]
    lines += _spectra({name: result for name, result in found.items() if name.endswith("-spectrum")}, figures)
    lines += _calibrations({name: result for name, result in found.items() if name.endswith("-calibration")})
    evaluated = {name: result for name, result in found.items() if name.rsplit("-", 1)[1] in ("main", *STUDIES)}
    return "\n".join([*lines, *_how(evaluated)]) + "\n"


def swept(found: Results) -> list[str]:
    """The denoisers whose ratios or alphas were swept."""
    ends = tuple(f"-{study}" for study in STUDIES)
    return list(dict.fromkeys(name.rsplit("-", 1)[0] for name in found if name.endswith(ends)))


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a result file."""
    return [Row(**row) for row in result["rows"]]


def _count(result: Mapping[str, Any]) -> str:
    return f"{result['images']} images classified, {result['generated']} generated"


def _overview(mains: Results) -> str:
    methods = list(dict.fromkeys(row["method"] for result in mains.values() for row in result["rows"]))
    head = ["method", "what it does", *(f"{model}: accuracy, % | FID" for model in mains)]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: | ---: |" * len(mains)]
    for method in methods:
        cells = [f"`{method}`", WHAT.get(plain(method), "")]
        for result in mains.values():
            row = next((row for row in rows_of(result) if row.method == method), None)
            fid = "-" if row is None or row.fid is None else f"{row.fid:.2f}"
            accuracy = "-" if row is None else f"{100 * row.accuracy:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
            cells += [accuracy, fid]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _chances(mains: Results) -> str:
    chances = {model.split("-")[0]: f"{100 / result['classes']:.0f} %" for model, result in mains.items()}
    return ", ".join(f"{chance} on {data}" for data, chance in chances.items())


def _claims(mains: Results) -> list[str]:
    """A verdict on each claim and denoiser: only an interval that excludes zero decides."""
    lines = []
    for method, claim in CLAIMS:
        verdicts = []
        for model, result in mains.items():
            row = next((row for row in rows_of(result) if plain(row.method) == method), None)
            if row is None or row.gain is None or row.gain_low is None or row.gain_high is None:
                continue
            word = "better" if row.gain_low > 0 else "worse" if row.gain_high < 0 else "not decided"
            verdicts.append(
                f"{model} {100 * row.gain:+.1f} points ({100 * row.gain_low:+.1f} to {100 * row.gain_high:+.1f}, "
                f"p {row.p:.2g}), {word}"
            )
        if verdicts:
            lines += [f"- {claim}: {'; '.join(verdicts)}."]
    return [*lines, ""]


def _times(mains: Results) -> list[str]:
    """Compressed and compiled against the dense model, eager and compiled: what the classifier's throughput becomes."""
    head = "| denoiser | method, compiled | ms | throughput over dense, eager | over dense, compiled |"
    lines = []
    for model, result in mains.items():
        times = result["ms"]
        for method in times:
            if method != EAGER:
                over = [f"{times[other] / times[method]:.2f}x" for other in (EAGER, "dense")]
                lines.append(f"| {model} | `{method}` | {times[method]:.1f} | {over[0]} | {over[1]} |")
    if not lines:
        return []
    rows = " or ".join(sorted({str(result["batch"]) for result in mains.values()}))
    what = (
        f"One call of {rows} rows, medians of rounds in turn in one process. Classifying takes as many calls with "
        "every method: images per second are in the same ratio."
    )
    return ["## Time", "", what, "", head, "| --- | --- | ---: | ---: | ---: |", *lines, ""]


def _spectra(found: Results, figures: Path) -> list[str]:
    """Retention and error of the highest frequencies."""
    lines = []
    for name, result in found.items():
        methods = result["methods"]
        steps = next(iter(methods.values()))["timesteps"]
        lines += [f"### {result['model']}", "", "| method | " + " | ".join(f"t = {step}" for step in steps) + " |"]
        lines += ["| --- |" + " ---: |" * len(steps)]
        for method, item in methods.items():
            high = [index for index, frequency in enumerate(item["frequencies"]) if frequency > HIGH]
            means = [
                [sum(curve[index] for index in high) / len(high) for curve in item[kind]]
                for kind in ("retention", "deviation")
            ]
            cells = [f"{left:.2f}, {lost:.2f}" for left, lost in zip(*means, strict=True)]
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
        lines += ["", f"![spectra of {result['model']}]({figures / name / 'spectrum.png'})", ""]
    if not lines:
        return []
    what = (
        f"Of the power above {HIGH:g} cycles per token, in what self-attention reads: the share that is left, and the "
        "power of the error, over what was there before; means of the attentions. An error above 1 is worse than "
        "nothing."
    )
    return ["## What becomes of high frequencies", "", what, "", *lines]


def _calibrations(found: Results) -> list[str]:
    """The alphas, and the ratios, that deviate least."""
    if not found:
        return []
    steps = next(iter(found.values()))["factors"]["2"]["timesteps"]
    head = ["denoiser", "factor", "schedule", "constant", *(f"t = {step:g}" for step in steps)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    ratios = ["| denoiser | given | calibrated | deviation over given |", "| --- | --- | --- | ---: |"]
    for result in found.values():
        for factor, item in result["factors"].items():
            best = [f"{alpha:.2f}" for alpha in item["best"]]
            cells = [result["model"], factor, f"`{item['schedule']}`", f"`{item['constant']}`", *best]
            lines.append("| " + " | ".join(cells) + " |")
        for given, item in result["merging"].items():
            ratios.append(f"| {result['model']} | `{given}` | `{item['method']}` | {min(item['relative']):.2f} |")
    what = "The alpha whose output deviates least from dense (`bigain_fx.calibrate`, on training images), by timestep."
    which = "A ratio for each attention, for no more work; cells of 2x2 or 4x4, whichever deviates less."
    return ["## Which alpha", "", what, "", *lines, "", "## Which ratios", "", which, "", *ratios, ""]


def _how(evaluated: Results) -> list[str]:
    lines = [
        "## How", "",
        "The classifier is that of [operators.md](operators.md): every class sees the same pairs of timestep and "
        "noise, with every method. Accuracy has a 95 % Wilson interval. Points are accuracy minus that of ToMe or ToDo "
        "at equal ratio or factor (in the long tables: of the method in *against*), image by image, with the paired "
        "95 % bootstrap interval; *p* is McNemar's exact test. Nothing is corrected for the number of comparisons. FID "
        "compares generated images with the held-out ones by the features of a small classifier of the same data that "
        "ships with the package, not of Inception: it ranks methods on one data set, and is comparable to no published "
        "figure.", "",
    ]  # fmt: skip
    for name, result in evaluated.items():
        first, *later = result["n_samples"]
        rounds = [f"{first} pairs of timestep and noise for each of {result['classes']} classes"]
        rounds += [f"{pairs} in all for the best {kept}" for pairs, kept in zip(later, result["to_keep"], strict=False)]
        lines.append(
            f"- {name}: {_count(result)}; {', then '.join(rounds)}; {result['steps']} steps, guidance "
            f"{result['guidance']:g}; {result['machine']['processor']}, torch {result['machine']['torch']}."
        )
    return lines
