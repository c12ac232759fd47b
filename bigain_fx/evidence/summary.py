"""From what was measured to one table and one figure: accuracy with its interval, FID, deviation, work, time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bigain_fx.classify import wilson
from bigain_fx.evidence.evaluate import Measured
from bigain_fx.evidence.statistics import bootstrap, mcnemar
from bigain_fx.passes.methods import KV, MERGE, Methods, ToDo, ToMe

COLUMNS = (
    "method", "accuracy, %", "against", "points", "p", "agreement, %", "FID", "deviation, dB", "GFLOPs", "ms a call",
)  # fmt: skip
SIZES = {MERGE: ("ratio", "cell"), KV: ("factor",)}
LIKE = 0.05
"""How far apart the work of two methods may be, relatively, to be compared as equal compression."""


@dataclass(frozen=True)
class Row:
    """One method's line.

    Attributes:
        method: as it was asked for.
        correct, images: classified right (one of an image's labels), of how many.
        low, high: the 95 % interval of the accuracy (Wilson), from 0 to 1.
        against: the method that it is compared with: the baseline at equal compression, else dense, else none.
        gain, gain_low, gain_high: accuracy minus that of ``against``, and its paired 95 % bootstrap interval.
        p: McNemar's exact test against it.
        mean_average_precision: over the classes, where images have several labels; else None.
        agreement: share of the images that are given the class that dense gives them; None without dense.
        fid: of the generated images against the data; None where none were generated.
        db: ``20 log10(||dense|| / ||dense - row||)`` of one call; None for dense, or without it.
        gflops: of one call.
        ms: median time of one call, compiled; None where it was not measured.
        sites: attentions that were changed.
    """

    method: str
    correct: int
    images: int
    low: float
    high: float
    against: str | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    p: float | None
    mean_average_precision: float | None
    agreement: float | None
    fid: float | None
    db: float | None
    gflops: float
    ms: float | None
    sites: int

    @property
    def accuracy(self) -> float:
        """Share of the images that were classified right."""
        return self.correct / self.images


def rows(
    measured: Mapping[str, Measured],
    methods: Mapping[str, Methods],
    labels: Sequence[tuple[int, ...]],
    fids: Mapping[str, float],
    milliseconds: Mapping[str, float],
) -> list[Row]:
    """A row for each method, in order.

    Args:
        measured, methods: by text; classified images are the first of ``labels``.
        labels: of each image.
        fids, milliseconds: by text, where known.
    """
    right = {text: _right(item, labels) for text, item in measured.items()}
    dense = next((text for text, given in methods.items() if not given), None)
    found = []
    for text, item in measured.items():
        correct, n = int(right[text].sum()), len(right[text])
        low, high = wilson(correct, n)
        other = _baseline(text, methods, measured) or (dense if text != dense else None)
        gain = right[text].double() - right[other].double() if other else None
        gain_low, gain_high = bootstrap(gain) if gain is not None else (None, None)
        apart = dense is not None and text != dense
        found.append(
            Row(
                text, correct, n, low, high, other, None if gain is None else float(gain.mean()), gain_low, gain_high,
                mcnemar(right[text], right[other]) if other else None, _mean_average_precision(item, labels[:n]),
                float((item.classification.predicted == measured[dense].classification.predicted).double().mean())
                if dense
                else None,
                fids.get(text), _db(measured[dense].probe, item.probe) if apart and dense else None, item.gflops,
                milliseconds.get(text), item.sites,
            )
        )  # fmt: skip
    return found


def _right(item: Measured, labels: Sequence[tuple[int, ...]]) -> Tensor:
    predicted = item.classification.predicted.tolist()
    return torch.tensor([found in labels[index] for index, found in enumerate(predicted)])


def _baseline(text: str, methods: Mapping[str, Methods], measured: Mapping[str, Measured]) -> str | None:
    """ToMe or ToDo with the same compression, if it was measured too and ``text`` is not a baseline itself.

    Where none has the same ratio and cells, or factor, that is the one of nearest work, if within :data:`LIKE`.
    """
    mine = methods[text]
    if not mine or any(isinstance(method, ToMe | ToDo) for method in mine):
        return None
    others = [
        other for other, theirs in methods.items()
        if theirs and all(isinstance(method, ToMe | ToDo) for method in theirs) and _where(theirs) == _where(mine)
    ]  # fmt: skip
    same = [other for other in others if _size(methods[other]) == _size(mine)]
    apart = {other: abs(measured[other].gflops / measured[text].gflops - 1) for other in others}
    near = [other for other in sorted(others, key=apart.__getitem__) if apart[other] <= LIKE]
    return next(iter(same + near), None)


def _where(methods: Methods) -> list[tuple[Any, ...]]:
    return [(method.kind, method.levels, method.where, getattr(method, "scope", None)) for method in methods]


def _size(methods: Methods) -> list[tuple[Any, ...]]:
    return [tuple(getattr(method, name) for name in SIZES[method.kind]) for method in methods]


def _mean_average_precision(item: Measured, labels: Sequence[tuple[int, ...]]) -> float | None:
    if all(len(given) == 1 for given in labels):
        return None
    from torchmetrics.functional.classification import multilabel_average_precision

    errors = item.classification.errors
    targets = torch.zeros(errors.shape, dtype=torch.int64)
    for index, given in enumerate(labels):
        targets[index, list(given)] = 1
    # Scores must lie between 0 and 1, and only their order counts.
    scores = 1 - errors.argsort(0).argsort(0).double() / len(errors)
    present = targets.sum(0) > 0
    each = multilabel_average_precision(scores[:, present], targets[:, present], int(present.sum()), average="none")
    return float(each.mean())


def _db(dense: Tensor, output: Tensor) -> float:
    error = (dense - output).norm()
    return math.inf if error == 0 else float(20 * torch.log10(dense.norm() / error))


def fids(real: Iterable[Tensor], generated: Mapping[str, Tensor], extractor: torch.nn.Module | int) -> dict[str, float]:
    """Frechet distances between the features of real and of generated images, by name (Heusel et al. 2017).

    Args:
        real: batches ``(n, C, H, W)`` uint8, read once.
        generated: ``(n, C, H, W)`` uint8, two images or more each.
        extractor: features ``(n, d)`` of such images; or how many of Inception's.

    Raises:
        ModuleNotFoundError, OSError: Inception was asked for, and torch-fidelity or the weights cannot be had.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=extractor, reset_real_features=False)
    for batch in real:
        metric.update(batch, real=True)
    found = {}
    for name, images in generated.items():
        metric.reset()
        metric.update(images, real=False)
        found[name] = float(metric.compute())
    return found


def to_table(found: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in found)]) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    def shown(value: float | None, form: str = "{:.1f}") -> str:
        return "-" if value is None else "exact" if value == math.inf else form.format(value)

    gain = "-"
    if row.gain is not None and row.gain_low is not None and row.gain_high is not None:
        gain = f"{100 * row.gain:+.1f} ({100 * row.gain_low:+.1f} to {100 * row.gain_high:+.1f})"
    accuracy = f"{100 * row.accuracy:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
    if row.mean_average_precision is not None:
        accuracy += f", mAP {100 * row.mean_average_precision:.1f}"
    agreement = None if row.agreement is None else 100 * row.agreement
    return (
        f"`{row.method}`", accuracy, f"`{row.against}`" if row.against else "-", gain, shown(row.p, "{:.2g}"),
        shown(agreement), shown(row.fid, "{:.2f}"), shown(row.db), shown(row.gflops, "{:.2f}"), shown(row.ms),
    )  # fmt: skip


def figure(title: str, found: Sequence[Row]) -> Figure:
    """Accuracy and FID of every method, one under the other, dense as a line."""
    drawn = [("accuracy, %, 95 % interval", [100 * row.accuracy for row in found])]
    if all(row.fid is not None for row in found):
        drawn.append(("FID, lower is better", [row.fid or 0.0 for row in found]))
    result = Figure(figsize=(4.5 * len(drawn) + 1.5, 0.32 * len(found) + 1.4), layout="constrained")
    result.suptitle(title)
    axes = result.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    places = list(range(len(found)))
    colours = [
        "0.3" if row.against is None else "tab:blue" if "bigain" in row.method else "tab:orange" for row in found
    ]
    for axis, (label, values) in zip(axes, drawn, strict=True):
        axis.scatter(values, places, c=colours, zorder=3)
        axis.axvline(values[0], color="0.7", linewidth=1)
        axis.set_xlabel(label)
        axis.grid(axis="x", color="0.9")
    for place, row, colour in zip(places, found, colours, strict=True):
        axes[0].plot([100 * row.low, 100 * row.high], [place, place], color=colour)
    axes[0].set_yticks(places, [row.method for row in found])
    axes[0].invert_yaxis()
    return result


def to_dict(row: Row) -> dict[str, Any]:
    """A row as plain data; what is infinite (an exact output has no deviation) becomes None."""
    return asdict(row if row.db != math.inf else replace(row, db=None))
