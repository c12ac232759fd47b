"""The paper's destinations: where the image is smoothest."""

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
class Laplacian(Destinations):
    """The token of lowest Laplacian score in each cell (BiGain, L-GTM; ``docs/operators.md``, "Plan")."""

    name: ClassVar[str] = "laplacian"

    def positions(self, metric: Tensor, grid: Sequence[int], cell: Sequence[int]) -> Tensor:
        """Return ``(B, cells)`` int64; the first token of a cell on a tie."""
        from bigain_fx.passes.ops.score import laplacian_score, lowest_scoring

        return lowest_scoring(laplacian_score(metric, grid), grid, cell)

    def emit(self, surgeon: Surgeon, metric: Node, grid: Sequence[int], cell: Sequence[int], like: Node) -> Node | None:
        """Return None: ``merge_plan`` elects these itself, in the look at the metric that gives it the norms."""
        return None
