"""What a method leaves open, measured on the model: alpha of a downsampling, the ratio of every merged attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import overload

from torch import nn

from bigain_fx.calibration import alpha, ratio
from bigain_fx.calibration.alpha import AlphaCalibration
from bigain_fx.calibration.calls import Call
from bigain_fx.calibration.ratio import RatioCalibration
from bigain_fx.families import GridHint
from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.methods import KVDownsample, MergeMethod

Cell = tuple[int, int]
CELLS: tuple[Cell, ...] = ((4, 4),)

__all__ = ["AlphaCalibration", "RatioCalibration", "calibrate"]


@overload
def calibrate(
    model: nn.Module, calls: Iterable[Call], *, method: KVDownsample, schedule: bool = True, grid: GridHint = None
) -> AlphaCalibration: ...
@overload
def calibrate(
    model: nn.Module,
    calls: Iterable[Call],
    *,
    method: MergeMethod,
    cells: Iterable[Cell] = CELLS,
    grid: GridHint = None,
) -> RatioCalibration: ...
def calibrate(
    model: nn.Module,
    calls: Iterable[Call],
    *,
    method: KVDownsample | MergeMethod,
    schedule: bool = True,
    cells: Iterable[Cell] = CELLS,
    grid: GridHint = None,
) -> AlphaCalibration | RatioCalibration:
    """Fit ``method`` to ``model``, so that outputs deviate least from the dense ones at the same cost.

    A downsampling gets its alpha. A merge gets a ratio for each attention in place of the one that is given, for no
    more FLOPs in all, and the cell at which that does best (``docs/operators.md``, "Calibration").

    Args:
        model, grid: as for :func:`bigain_fx.optimize`.
        calls: keyword arguments of some calls, on images from the training data, noised: one timestep a call, several
            of them over the whole range.
        method: whose alpha or ratio is replaced.
        schedule: find alpha as a :class:`LinearAlpha`; else a number. Ratios are the same at every timestep.
        cells: ``(rows, columns)`` to try for a merge beside its own. Larger ones let some attentions merge nearly all.

    Raises:
        MethodError: an entry of ``cells`` is no cell.
        InputError: no call, one without a timestep or with several, or a schedule of alpha from one timestep; calls of
            different shapes, to calibrate ratios; ``method`` is no such method, or rewrites no attention.
        BigainError: as for :func:`bigain_fx.optimize`.
    """
    if not isinstance(calls, Iterable) or isinstance(calls, str | Mapping):
        raise InputError(f"{checks.told('calls', calls)} must be several calls, a mapping of arguments each")
    given = [dict(checks.keywords("calls", call)) for call in calls]
    checks.flag("schedule", schedule)
    if not isinstance(cells, Iterable) or isinstance(cells, str | bytes):
        raise InputError(f"{checks.told('cells', cells)} must be pairs (rows, columns), such as ((4, 4),)")
    if not given:
        raise InputError("calls is empty; give the arguments of some calls, at several timesteps")
    if isinstance(method, KVDownsample):
        return alpha.fit(model, given, method, schedule=schedule, grid=grid)
    if isinstance(method, MergeMethod):
        pairs = [tuple(cell) if isinstance(cell, list) else cell for cell in cells]
        tried = [replace(method, ratio=0.0, cell=cell).cell for cell in pairs]  # what is no cell is refused
        return ratio.fit(model, given, method, cells=tried, grid=grid)
    raise InputError(
        f"{checks.told('method', method)} has neither an alpha nor a ratio; give a KVDownsample, or a merge"
    )
