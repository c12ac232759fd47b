"""Alpha of the KV downsampling, measured instead of copied: what leaves the denoiser's output nearest to dense.

The paper's alphas, 0.9 to classify and 0.8 to 1.2 to generate, were tuned on large grids. Which alpha is best depends
on the model and on the noise; a few calls tell (``docs/operators.md``, "Calibration").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bigain_fx.calibration.calls import Call, output_of, step_of
from bigain_fx.denoiser import optimize
from bigain_fx.families import GridHint, timestep_units
from bigain_fx.passes.alpha import LinearAlpha
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.methods import KVDownsample

ALPHAS = (-0.5, 0.0, 0.5, 1.0, 1.5)
"""Equally far apart."""


@dataclass(frozen=True)
class AlphaCalibration:
    """The alpha that fits best.

    Attributes:
        method: with that alpha.
        timesteps: of the calls, ascending.
        best: alpha of least deviation at each of them.
        deviation: mean squared deviation from the dense output at each of them, with that alpha.
        alphas: those that were tried.
        tried: the deviation with each of them, at each timestep.
    """

    method: KVDownsample
    timesteps: tuple[float, ...]
    best: tuple[float, ...]
    deviation: tuple[float, ...]
    alphas: tuple[float, ...]
    tried: tuple[tuple[float, ...], ...]


def fit(
    model: nn.Module, calls: Sequence[Call], method: KVDownsample, *, schedule: bool, grid: GridHint
) -> AlphaCalibration:
    """See :func:`bigain_fx.calibrate`.

    Around its minimum the squared deviation is nearly a parabola of alpha: one is put through the three best points
    of each timestep, and through their minima a line over the timesteps, or one number. A timestep counts by how much
    is lost beside its minimum, relative to that.
    """
    steps = [step_of(call) for call in calls]
    if schedule and len(set(steps)) < 2:
        raise InputError(f"calls have the timesteps {sorted(set(steps))}; give two or more, one without a schedule")
    fast = optimize(model, method=replace(method, alpha=ALPHAS[0]), backend="eager", grid=grid)
    squared: dict[float, Tensor] = {}
    with torch.no_grad():
        for step, call in zip(steps, calls, strict=True):
            dense = output_of(model, call)
            found = torch.stack(
                [(output_of(_with_alpha(fast, call, alpha), call) - dense).square().mean() for alpha in ALPHAS]
            )
            squared[step] = squared.get(step, torch.zeros(len(ALPHAS), dtype=torch.float64)) + found.double().cpu()
    timesteps = tuple(sorted(squared))
    curves = torch.stack([squared[step] / steps.count(step) for step in timesteps])
    best, bent, deviation = _lowest(curves)
    weight = bent / deviation.clamp_min(float(deviation.max()) * 1e-6)
    alpha: float | LinearAlpha = round(float((weight * best).sum() / weight.sum()), 3)
    if schedule:
        noisy, clean = timestep_units(model) or (timesteps[-1], timesteps[0])
        alpha = _line(torch.tensor(timesteps, dtype=torch.float64), best, weight, noisy, clean)
    return AlphaCalibration(
        replace(method, alpha=alpha), timesteps, tuple(best.tolist()), tuple(deviation.tolist()), ALPHAS,
        tuple(map(tuple, curves.tolist())),
    )  # fmt: skip


def _lowest(curves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each of ``curves (n, alphas)`` is lowest, how bent it is there, how low: by parabolas, ``(n,)`` each."""
    step = ALPHAS[1] - ALPHAS[0]
    middle = curves.argmin(1).clamp(1, len(ALPHAS) - 2)
    left, centre, right = (curves.gather(1, (middle + side).unsqueeze(1)).squeeze(1) for side in (-1, 0, 1))
    bent = ((left + right) / 2 - centre).clamp_min(1e-12 * float(curves.max()))
    shift = ((left - right) / (4 * bent)).clamp(-1, 1)
    best = torch.tensor(ALPHAS, dtype=torch.float64)[middle] + step * shift
    return best, bent, centre + (right - left) / 2 * shift + bent * shift**2


def _line(timesteps: Tensor, best: Tensor, weight: Tensor, noisy: float, clean: float) -> LinearAlpha:
    """The line of least weighted squares, named by its values at the two ends."""
    share = (timesteps - noisy) / (clean - noisy)
    design = torch.stack([1 - share, share], 1) * weight.sqrt().unsqueeze(1)
    ends = torch.linalg.lstsq(design, (weight.sqrt() * best).unsqueeze(1)).solution.flatten().tolist()
    return LinearAlpha(round(ends[0], 3), round(ends[1], 3), noisy, clean)


def _with_alpha(fast: Any, call: Call, alpha: float) -> Any:
    """``fast``, its literal alpha replaced."""
    module = fast.prepare(**call).graph
    nodes = [node for node in module.graph.nodes if node.target is torch.ops.bigain.kv_downsample.default]
    if not nodes:
        raise InputError(
            f"method rewrites no attention of {type(fast.original).__name__}; bigain_fx.inspect() tells why"
        )
    for node in nodes:
        node.update_arg(1, alpha)
    module.recompile()
    return fast
