"""The released code's destinations: elected in runs of a row, applied in cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bigain_fx.passes.destinations.rule import Destinations

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rows(Destinations):
    """Where the score is lowest in a run of a row, for the cell of the same number (``docs/operators.md``)."""

    name: ClassVar[str] = "row"

    def positions(self, metric: Tensor, grid: Sequence[int], cell: Sequence[int]) -> Tensor:
        """Return ``(B, cells)`` int64: where the lowest score lies in the j-th run of each band, for its j-th cell.

        A run has ``rows * columns`` tokens, a band ``rows`` rows, cropped to complete cells.
        """
        from bigain_fx.passes.ops.score import complete_cells, laplacian_score

        (h, w), (rows, columns) = grid, cell
        down, across = complete_cells(grid, cell)
        score = laplacian_score(metric, grid).view(-1, h, w)[:, : down * rows, : across * columns]
        return score.reshape(len(score), down * across, rows * columns).argmin(-1)
