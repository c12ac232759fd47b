"""A ratio for each attention, at no more FLOPs than one ratio for all.

Some attentions hardly show in the output when their tokens merge, others ruin it. Each is merged alone, at a few
ratios; what is lost and what is saved by each says where to merge much (``docs/operators.md``, "Calibration").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import truediv
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bigain_fx import families
from bigain_fx.calibration.calls import Call, output_of, step_of
from bigain_fx.calls import CallBinder, flat_tensors, signature_of
from bigain_fx.capture import capture
from bigain_fx.denoiser import optimize
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.methods import MergeMethod
from bigain_fx.passes.pipeline import Rewritten, left_out
from bigain_fx.settings import Settings

TRIED = (1 / 3, 2 / 3, 1.0)
"""Shares of the largest ratio at which each attention is merged alone."""
FINE = 24
"""The ratios to choose from: so many steps up to the largest."""
EAGER = Settings("eager")


@dataclass(frozen=True)
class RatioCalibration:
    """The ratios that fit best.

    Attributes:
        method: with a ratio for each attention, and the cell that does best; the given one if none does better.
        timesteps: of the calls, ascending.
        deviation: mean squared deviation from the dense output at each of them, with ``method``.
        given: the same with the method that was given.
        ratios: those that were tried on each attention alone, with the cell of ``method``.
        tried: for each attention, what each of them loses: its deviation over that of one ratio for all with this cell,
            the mean of the timesteps.
    """

    method: MergeMethod
    timesteps: tuple[float, ...]
    deviation: tuple[float, ...]
    given: tuple[float, ...]
    ratios: tuple[float, ...]
    tried: tuple[tuple[float, ...], ...]


def fit(
    model: nn.Module,
    calls: Sequence[Call],
    method: MergeMethod,
    *,
    cells: Sequence[tuple[int, int]],
    grid: families.GridHint,
) -> RatioCalibration:
    """See :func:`bigain_fx.calibrate`."""
    optimize(model, method=method, backend="eager", grid=grid).prepare(**calls[0])  # every error there may be
    trial = _Trial(model, calls, grid)
    given, whole = trial.deviation(method)
    if not float(given.min()) > 0:
        raise InputError(f"method={str(method)!r} rewrites no attention of {type(model).__name__}, or changes nothing")
    found = [_fit(trial, method, given, whole)]
    for other in (replace(method, cell=cell) for cell in cells if tuple(cell) != method.cell):
        deviation, rewritten = trial.deviation(other)
        if rewritten.flops_after <= whole.flops_after:  # more where a grid has no such cell
            found.append(_fit(trial, other, deviation, rewritten))
    best = min(found, key=lambda each: fmean(map(truediv, each.deviation, found[0].given)))
    return replace(best, given=found[0].given)


def _fit(trial: _Trial, method: MergeMethod, given: Tensor, whole: Rewritten) -> RatioCalibration:
    """With the cell of ``method``, which makes the graph ``whole`` and deviates as ``given``.

    Losses are taken to add up, and to be linear between the ratios that were tried; the result is checked.
    """
    count = sum(record.level is not None and left_out(method, record) is None for record in whole.records)
    cap = 1 - 1 / math.prod(method.cell)
    ratios = tuple(cap * share for share in TRIED)
    lost, saved = torch.zeros(2, count, len(ratios), dtype=torch.float64)
    for site in range(count):
        for index, ratio in enumerate(ratios):
            alone = replace(method, ratio=tuple(ratio * (site == other) for other in range(count)))
            deviation, rewritten = trial.deviation(alone)
            lost[site, index], saved[site, index] = (deviation / given).mean(), rewritten.flops - rewritten.flops_after
    fine = torch.linspace(0, cap, FINE + 1, dtype=torch.float64)[1:]
    tried = torch.tensor(ratios, dtype=torch.float64)
    losses, savings = _between(tried, lost, fine), _parabolas(tried, saved, fine)
    target, most = float(whole.flops - whole.flops_after), float(savings.amax(1).clamp_min(0).sum())
    while True:
        shares = [float(fine[index - 1]) if index else 0.0 for index in allocate(losses, savings, target)]
        best = replace(method, ratio=tuple(min(cap, math.ceil(share * 1e4) / 1e4) for share in shares))
        deviation, rewritten = trial.deviation(best)
        missing = rewritten.flops_after - whole.flops_after
        if missing <= 0 or target >= most:
            break
        target += missing  # tokens are whole numbers: a little more work was left than was expected
    if missing > 0 or float((deviation / given).mean()) >= 1:
        best, deviation = method, given
    return RatioCalibration(
        best, trial.timesteps, tuple(deviation.tolist()), tuple(given.tolist()), ratios,
        tuple(map(tuple, lost.tolist())),
    )  # fmt: skip


class _Trial:
    """The denoiser, captured once and rewritten by one method after the other, against its dense outputs."""

    def __init__(self, model: nn.Module, calls: Sequence[Call], grid: families.GridHint) -> None:
        self.model, self.steps = model, [step_of(call) for call in calls]
        self.timesteps = tuple(sorted(set(self.steps)))
        binder = CallBinder(model)
        arguments = [binder.bind((), call)[0] for call in calls]
        if len({signature_of(each) for each in arguments}) > 1:
            raise InputError("calls differ in more than values; give all of them the same shapes, dtypes and constants")
        self.grid = families.grid_for(grid, arguments[0], families.GridReader()(arguments[0])).grid
        self.captured = capture(model, arguments[0])
        self.inputs = [flat_tensors(each) for each in arguments]
        with torch.no_grad():
            self.dense = [output_of(model, call) for call in calls]

    def deviation(self, method: MergeMethod) -> tuple[Tensor, Rewritten]:
        """The mean squared deviation ``(timesteps,)`` float64, and the graph."""
        rewritten = EAGER.rewrite(self.captured.module, (method,), self.grid)
        squared = dict.fromkeys(self.timesteps, 0.0)
        with torch.no_grad():
            for step, dense, inputs in zip(self.steps, self.dense, self.inputs, strict=True):
                output = pytree.tree_unflatten(rewritten.module(*inputs), self.captured.out_spec)[0]
                squared[step] += float((output.float() - dense).square().mean()) / self.steps.count(step)
        return torch.tensor(list(squared.values()), dtype=torch.float64), rewritten


def allocate(lost: Tensor, saved: Tensor, target: float) -> list[int]:
    """Choose for every attention one of its ratios, or none, so that ``target`` is saved and little is lost.

    Each goes along the lower convex hull of what it may lose over what it saves; the flattest pieces are taken first.

    Args:
        lost, saved: ``(attentions, n)``, by ascending ratio.
        target: to be saved in all.

    Returns:
        For each attention a number from 0, none, to n.
    """
    pieces: list[tuple[float, int, int, float]] = []
    for site, (losses, savings) in enumerate(zip(lost.tolist(), saved.tolist(), strict=True)):
        hull = list(_lower_hull([(0.0, 0.0), *zip(savings, losses, strict=True)]))
        for (_, s0, l0), (index, s1, l1) in pairwise(hull):
            pieces.append(((l1 - l0) / (s1 - s0), site, index, s1 - s0))
    chosen, total = [0] * len(lost), 0.0
    for _, site, index, saving in sorted(pieces):
        if total >= target:
            break
        chosen[site] = index
        total += saving
    return chosen


def _lower_hull(points: Sequence[tuple[float, float]]) -> Iterable[tuple[int, float, float]]:
    """The lower convex hull from the first point on, as ``(index, x, y)`` of ascending x."""
    hull: list[tuple[int, float, float]] = []
    first, *others = [(index, x, y) for index, (x, y) in enumerate(points)]
    for point in [first, *sorted((each for each in others if each[1] > 0), key=lambda each: each[1:])]:
        if hull and point[1] == hull[-1][1]:
            continue  # it saves as much, and loses no less
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: tuple[int, float, float], right: tuple[int, float, float]) -> float:
    return (right[2] - left[2]) / (right[1] - left[1])


def _between(tried: Tensor, lost: Tensor, fine: Tensor) -> Tensor:
    """``lost (attentions, tried)``, nothing at ratio 0, at the ``fine`` ratios: by straight lines."""
    x = torch.cat([torch.zeros(1, dtype=tried.dtype), tried])
    y = torch.cat([torch.zeros(len(lost), 1, dtype=lost.dtype), lost], 1)
    right = torch.searchsorted(x, fine.clamp(max=float(x[-1]))).clamp(1, len(tried))
    share = (fine - x[right - 1]) / (x[right] - x[right - 1])
    return y[:, right - 1] + share * (y[:, right] - y[:, right - 1])


def _parabolas(tried: Tensor, saved: Tensor, fine: Tensor) -> Tensor:
    """``saved (attentions, 3)`` at the ``fine`` ratios: work is quadratic in the tokens that are left."""
    coefficients = torch.linalg.solve(torch.vander(tried), saved.mT)
    result: Tensor = (torch.vander(fine, 3) @ coefficients).mT
    return result
