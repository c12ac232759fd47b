"""ToMe's destinations: drawn at random, whatever the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bigain_fx.passes.destinations.rule import Destinations

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from bigain_fx.passes.surgery import Surgeon


@dataclass(frozen=True)
class Random(Destinations):
    """A random token of each cell: one draw per graph and grid (ToMe for diffusion, Bolya and Hoffman 2023).

    Attributes:
        seed: of the draw.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def positions(self, metric: Tensor | None, grid: Sequence[int], cell: Sequence[int]) -> Tensor:
        """Return ``(cells,)`` int64 on the CPU."""
        import torch

        from bigain_fx.passes.ops.score import complete_cells

        down, across = complete_cells(grid, cell)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(cell[0] * cell[1], (down * across,), generator=generator)

    def emit(self, surgeon: Surgeon, metric: Node, grid: Sequence[int], cell: Sequence[int], like: Node) -> Node | None:
        """Emit a constant."""
        return surgeon.constant(f"bigain_positions_{grid[0]}x{grid[1]}", self.positions(None, grid, cell), like=like)
