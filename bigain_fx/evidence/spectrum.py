"""Balanced spectral retention, measured: how much of each frequency is left in what a rewritten self-attention reads.

Features are taken as the rewrite finds them and as it leaves them, there on the whole grid again: each token with its
group's mean, or with the row that stands for its block of keys and values. Power is no likeness: what aliasing puts
into a frequency counts as well, and can lift its retention above 1. So the power of the difference is measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor, nn

from bigain_fx.denoiser import optimize
from bigain_fx.evidence.plans import Call, observe
from bigain_fx.families import GridHint
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.images import Grid, as_grids
from bigain_fx.passes.methods import Method, normalize
from bigain_fx.passes.ops import downsampled_grid

bigain = torch.ops.bigain
MERGE = bigain.merge.default
DOWNSAMPLINGS = frozenset({bigain.kv_downsample.default, bigain.kv_downsample.Tensor})
TICKS = (1, 1.5, 2, 3, 5, 7)


@dataclass(frozen=True, eq=False)
class Spectra:
    """Power, by radial frequency, of what rewritten self-attentions read.

    Attributes:
        sites: module paths of the attentions, in graph order.
        timesteps: as they were asked for.
        frequencies: ``(bins,)``, in cycles per token, from 0 to 0.5 (Nyquist).
        before: ``(timesteps, sites, bins)``; upstream of a site the denoiser is compressed already.
        after: the same, once tokens were merged or downsampled.
        error: the same, of the difference between the two.
    """

    sites: tuple[str, ...]
    timesteps: tuple[int, ...]
    frequencies: Tensor
    before: Tensor
    after: Tensor
    error: Tensor

    @property
    def retention(self) -> Tensor:
        """``after / before``, ``(timesteps, sites, bins)``; NaN where there was and is nothing."""
        return self.after / self.before

    @property
    def deviation(self) -> Tensor:
        """``error / before``, ``(timesteps, sites, bins)``: 0 is lossless, 1 as bad as nothing at all."""
        return self.error / self.before


def radial_power(features: Tensor, grid: Sequence[int], *, corners: bool = False) -> Tensor:
    """Mean power of the Fourier coefficients at each radius, averaged over samples and channels.

    The transform is orthonormal: over all coefficients, power sums to the energy of the tokens. A radius is a length
    in cycles per token, in steps of one cycle per shorter side: a texture has one frequency whatever the grid's shape.

    Args:
        features: ``(B, N, C)`` floating, tokens row-major; transformed in float32, or float64 if it is that.
        grid: ``(h, w)`` with ``h * w == N``.
        corners: radii above Nyquist too, which only diagonal waves reach.

    Returns:
        ``(min(h, w) // 2 + 1,)`` float32 or float64 on the CPU, more with ``corners``; bin ``i`` lies at ``i /
        min(h, w)``.

    Raises:
        InputError: ``features`` are not ``(B, N, C)`` floating, or not of the grid.
    """
    h, w = grid
    if features.ndim != 3 or not features.is_floating_point() or features.shape[1] != h * w:
        shape, dtype = tuple(features.shape), features.dtype
        raise InputError(f"features has shape {shape} and dtype {dtype}; it must be floating, (B, {h * w}, C)")
    image = features if features.dtype == torch.float64 else features.float()
    power = torch.fft.fft2(image.unflatten(1, (h, w)), dim=(1, 2), norm="ortho").abs().square().mean((0, 3))
    down, across = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (h, w))
    radius = (torch.hypot(down[:, None], across) * min(h, w)).round().long().flatten()
    count = radius.bincount()
    mean = torch.zeros(len(count), dtype=power.dtype).index_add(0, radius, power.cpu().flatten()) / count
    return mean if corners else mean[: min(h, w) // 2 + 1]


def measure(
    model: nn.Module,
    inputs_at: Callable[[int], Mapping[str, Any]],
    *,
    method: Method | Sequence[Method],
    timesteps: Sequence[int],
    grid: GridHint = None,
) -> Spectra:
    """Power of the features of every rewritten self-attention of ``model``, before and after, at each timestep.

    Args:
        model, grid: as for :func:`bigain_fx.optimize`.
        inputs_at: keyword arguments of the call at a timestep, the noise of its latents included.
        method: one merge, or one downsampling.
        timesteps: what ``inputs_at`` is called with.

    Raises:
        InputError: no timestep; not one method; it rewrites no attention, or attentions on several
            grids, or on a sequence that holds text or several images.
        BigainError: as for :func:`bigain_fx.optimize`.
    """
    methods = normalize(method)
    if len(methods) != 1:
        raise InputError(f"method={method!r} must be one merge, or one downsampling; measure each by itself")
    if not timesteps:
        raise InputError(f"timesteps={timesteps!r} is empty; give one or more")
    denoiser = optimize(model, method=methods, backend="eager", grid=grid)
    before, after, error = [], [], []
    for timestep in timesteps:
        calls = observe(denoiser, inputs_at(timestep), DOWNSAMPLINGS | {MERGE})
        places = {as_grids(site.grid) for site in denoiser.report.rewritten if site.grid}
        grids = [grid for place in places for grid in place]
        if len(grids) != 1:
            raise InputError(
                f"method={methods[0]} rewrites attentions on {len(grids)} grids {sorted(grids)}; it must be one: see "
                "bigain_fx.inspect(), or set levels=1"
            )
        sides = grids.pop()
        pairs = [_features(site, call, sides) for site, call in calls.items()]
        before.append(torch.stack([radial_power(found, sides) for found, _ in pairs]))
        after.append(torch.stack([radial_power(left, sides) for _, left in pairs]))
        error.append(torch.stack([radial_power(left - found, sides) for found, left in pairs]))
    frequencies = torch.arange(before[0].shape[-1]) / min(sides)
    stacked = (torch.stack(each) for each in (before, after, error))
    return Spectra(tuple(calls), tuple(timesteps), frequencies, *stacked)


def _features(site: str, call: Call, grid: Grid) -> tuple[Tensor, Tensor]:
    """What ``call`` was given and what it left of that, both ``(B, N, C)``."""
    x: Tensor = call.args[0]
    if x.shape[1] != grid[0] * grid[1]:
        raise InputError(f"{site} reads {x.shape[1]} rows, not the {grid[0]}x{grid[1]} tokens of an image alone")
    if call.operator is MERGE:
        return x, bigain.unmerge(call.result, call.args[1])
    factor: int = call.args[3]
    blocks: Tensor = call.result.unflatten(1, downsampled_grid(grid, factor))
    whole = blocks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, : grid[0], : grid[1]]
    return x, whole.flatten(1, 2)


def figure(spectra: Mapping[str, Spectra]) -> Figure:
    """A column a timestep: above what power is left, below that of the error, both against frequency.

    Both are averaged over the attentions; a line for each method.

    Args:
        spectra: by the name of the method, all at the same timesteps.

    Raises:
        InputError: there are none, or their timesteps differ.
    """
    timesteps = {found.timesteps for found in spectra.values()}
    if len(timesteps) != 1:
        raise InputError(f"spectra have the timesteps {sorted(timesteps)}; give one or more, all at the same timesteps")
    steps = timesteps.pop()
    columns = len(steps)
    drawn = Figure(figsize=(1.5 + 3.1 * columns, 5.6 + 0.25 * -(-len(spectra) // columns)), layout="constrained")
    drawn.suptitle("Power of what self-attention reads")
    rows = drawn.subplots(2, columns, sharey="row", squeeze=False)
    kinds = (("left", "retention", TICKS), ("error", "deviation", (1, 3)))
    for axes, (label, ratios, ticks) in zip(rows, kinds, strict=True):
        for index, axis in enumerate(axes):
            axis.grid(axis="y", color="0.92")
            axis.axhline(1, color="0.5", linewidth=1, linestyle="--")
            for name, found in spectra.items():
                ratio = getattr(found, ratios)[index].mean(0)
                axis.plot(found.frequencies.numpy(), ratio.numpy(), marker=".", label=name)
            axis.set(yscale="log", xlabel="frequency, cycles per token", title=f"{label}, timestep {steps[index]}")
            axis.spines[["top", "right"]].set_visible(False)
            axis.yaxis.set(major_locator=LogLocator(subs=ticks), major_formatter=StrMethodFormatter("{x:g}"),
                           minor_locator=NullLocator())  # fmt: skip
        axes[0].set_ylabel(f"{label} / before, mean of attentions")
    rows[1, 0].set_ylim(bottom=0.01)  # means keep the sum: no error at frequency 0 but for rounding
    panels = rows[0]
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    return drawn
