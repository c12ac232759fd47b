"""Where the detail is: the Laplacian score of tokens on a grid, and the destinations it elects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def laplacian_score(metric: Tensor, grid: Sequence[int]) -> Tensor:
    """Sum over channels of the absolute 3x3 Laplacian, zero-padded (``docs/operators.md``, "Score").

    Args:
        metric: ``(B, N, C)``, any floating dtype; computed in float32.
        grid: ``(h, w)`` with ``h * w == N``, tokens row-major.

    Returns:
        ``(B, N)`` float32, non-negative.
    """
    h, w = grid
    tokens = metric.float().unflatten(1, (h, w))
    padded = F.pad(tokens, (0, 0, 1, 1, 1, 1))
    neighbours = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    laplacian: Tensor = neighbours - 4 * tokens
    return laplacian.abs().sum(-1).flatten(1)


def complete_cells(grid: Sequence[int], cell: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of complete cells on ``grid``."""
    return grid[0] // cell[0], grid[1] // cell[1]


def cell_tokens(grid: Sequence[int], cell: Sequence[int], device: torch.device) -> Tensor:
    """Token index of every member of every complete cell: ``(cells, rows * columns)`` int64, both row-major."""
    (h, w), (rows, columns) = grid, cell
    down, across = complete_cells(grid, cell)
    index = torch.arange(h * w, device=device).view(h, w)[: down * rows, : across * columns]
    return index.view(down, rows, across, columns).transpose(1, 2).reshape(down * across, rows * columns)


def window_sides(grid: Sequence[int], cell: Sequence[int], window: int | None) -> tuple[int, int]:
    """Rows and columns of the windows that tile ``grid``: the largest that divide it and hold whole cells.

    They are at most ``window`` tokens long; an axis of which no such part is found, or any at None, stays whole.
    """
    rows, columns = (
        _longest(side, of, side if window is None else window) for side, of in zip(grid, cell, strict=True)
    )
    return rows, columns


def _longest(side: int, cell: int, limit: int) -> int:
    return max((part for part in range(cell, limit + 1, cell) if side % part == 0), default=side)


def lowest_scoring(score: Tensor, grid: Sequence[int], cell: Sequence[int]) -> Tensor:
    """Offset, within each complete cell, of its token of lowest score: ``(B, cells)`` int64, first on a tie."""
    return score[:, cell_tokens(grid, cell, score.device)].argmin(-1)
