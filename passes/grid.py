"""Which tokens lie on which ``(h, w)`` grid, read from the graph.

The rows and columns of every 4-D feature map are followed, by the rules of :mod:`bigain_fx.passes.axes`, through the
flatten, the patch embedding, residual adds, norms and attention to wherever tokens are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import Graph, Node

from bigain_fx.passes.axes import POINTWISE, Layout, Refusal, aten, named, propagate, shape_of
from bigain_fx.passes.errors import GridError

ROWS, COLUMNS = "rows", "columns"
Grid = tuple[int, int]


def image_layouts(graph: Graph) -> dict[Node, Layout]:
    """Layout of every node in which rows and columns of an image could be followed."""
    layouts: dict[Node, Layout] = {}
    for node in graph.nodes:
        shape = shape_of(node)
        followed = [source for source in node.all_input_nodes if source in layouts]
        layout: Layout | Refusal | None = None
        if node.target in (aten.conv2d.default, aten.conv2d.padding) or (node.op == "placeholder" and len(shape) == 4):
            layout = (named("", shape[0]), named("", shape[1]), named(ROWS, shape[2]), named(COLUMNS, shape[3]))
        elif node.target is aten.scaled_dot_product_attention.default and node.args[0] in layouts:
            layout = (*layouts[node.args[0]][:-1], named("", shape[-1]))
        elif followed and (node.args[0] in layouts or node.target in POINTWISE or node.target is aten.cat.default):
            layout = propagate(node, layouts)
        if layout is not None and not isinstance(layout, Refusal):
            layouts[node] = layout
    return layouts


def grid_of(layout: Layout | None, dim: int = 1) -> Grid | None:
    """The ``(h, w)`` of dimension ``dim``, if it is rows by columns and nothing else."""
    if layout is None or [axis.name for axis in layout[dim]] != [ROWS, COLUMNS]:
        return None
    return layout[dim][0].size, layout[dim][1].size


def grid_from_hint(hint: Grid, tokens: int) -> Grid | None:
    """The grid of ``tokens`` tokens, as the hint at the finest resolution coarsened by a whole factor; None if none.

    >>> grid_from_hint((64, 32), 512)
    (32, 16)
    """
    scale = math.isqrt(hint[0] * hint[1] // tokens)
    fits = scale > 0 and hint[0] % scale == 0 and hint[1] % scale == 0
    grid = (hint[0] // scale, hint[1] // scale) if fits else (0, 0)
    return grid if grid[0] * grid[1] == tokens else None


def check_hint(hint: Grid | None, inferred: Sequence[Grid | None], tokens: Sequence[int]) -> None:
    """Refuse a hint that contradicts what the graph says, or that fits no attention.

    Args:
        hint: ``(rows, columns)`` at the finest resolution, or None.
        inferred: grid of each self-attention, None where the graph cannot tell.
        tokens: number of tokens of each self-attention.

    Raises:
        GridError: with the hint, and what would fit.
    """
    if hint is None or not tokens:
        return
    if len(hint) != 2 or not all(isinstance(side, int) and side > 0 for side in hint):
        raise GridError(f"grid={hint!r} must be two positive integers (rows, columns), in image tokens")
    finest = max((grid for grid in inferred if grid is not None), key=math.prod, default=None)
    if finest is not None and tuple(hint) != finest:
        raise GridError(f"grid={hint!r} contradicts the graph, whose finest image grid is {finest}")
    if finest is None and all(grid_from_hint(hint, count) is None for count in tokens):
        raise GridError(f"grid={hint!r} has {math.prod(hint)} tokens; the attentions have {sorted(set(tokens))}")
