"""Which tokens lie on which ``(h, w)`` grid, read from the graph.

The rows and columns of every 4-D feature map are followed, by the rules of :mod:`bigain_fx.passes.rules`, through the
flatten, the patch embedding, residual adds, norms, attention and the company of text to wherever tokens are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Graph, Node

from bigain_fx.passes import checks
from bigain_fx.passes.arguments import SDPA
from bigain_fx.passes.axes import Axis, Layout, Refusal, aten, named, names, parts, shape_of
from bigain_fx.passes.errors import GridError
from bigain_fx.passes.memory import descendants
from bigain_fx.passes.rules import forget, propagate

FRAMES, ROWS, COLUMNS = "frames", "rows", "columns"
Grid = tuple[int, int]
CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding})


def image_layouts(graph: Graph, hint: Grid | None = None) -> dict[Node, Layout]:
    """Layout of every node in which rows and columns of an image could be followed.

    Args:
        graph: with ``meta["val"]`` on every node.
        hint: ``(rows, columns)`` of the first input's tokens, where that is ``(B, rows * columns, C)``.
    """
    found: dict[Node, Layout] = {}
    layouts: dict[Node, Layout] = {}  # of what still is what it was
    packed, samples = packed_input(graph, hint), sample_inputs(graph)
    sampled = descendants(samples, graph)
    for node in graph.nodes:
        forget(node, layouts)
        shape = shape_of(node)
        layout: Layout | Refusal | None = None
        if node is packed and hint:
            layout = (named("", shape[0]), named(ROWS, hint[0]) + named(COLUMNS, hint[1]), named("", shape[2]))
        elif node in samples or (node.target in CONVOLUTIONS and node in sampled):
            layout = _feature_map(shape)
        elif node.target is SDPA:
            layout = (*layouts[node.args[0]][:-1], named("", shape[-1])) if node.args[0] in layouts else None
        elif any(source in layouts for source in node.all_input_nodes):
            layout = propagate(node, layouts)
        if layout is not None and not isinstance(layout, Refusal):
            found[node] = layouts[node] = layout
    return found


def sample_inputs(graph: Graph) -> Sequence[Node]:
    """The noisy sample: the model's first argument that is more than one number a sample.

    Where the order of arguments is not known (a graph of Dynamo's), it is the first feature map.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder" and len(shape_of(node)) > 1]
    argument = inputs[0].meta.get("argument") if inputs else None
    if argument is not None:
        return [node for node in inputs if node.meta.get("argument") == argument]
    return ([node for node in inputs if len(shape_of(node)) > 3] or [n for n in inputs if len(shape_of(n)) > 2])[:1]


def packed_input(graph: Graph, hint: Grid | None) -> Node | None:
    """The first input, if it is the tokens of an image with the grid ``hint``: ``(B, rows * columns, C)``."""
    if hint is None:
        return None
    return next((node for node in sample_inputs(graph)[:1] if shape_of(node)[1:-1] == (math.prod(hint),)), None)


def _feature_map(shape: tuple[int, ...]) -> Layout | None:
    if len(shape) not in (4, 5):
        return None
    frames = [named(FRAMES, size) for size in shape[2:-2]]
    return (named("", shape[0]), named("", shape[1]), *frames, named(ROWS, shape[-2]), named(COLUMNS, shape[-1]))


def placed(node: Node, layouts: Mapping[Node, Layout]) -> tuple[Grid, int, int] | None:
    """The grid of the image among the rows of ``node (B, rows, C)``, and the number of rows before and after it."""
    layout = layouts.get(node)
    if layout is None or len(layout) != 3 or names(layout[0]) - {FRAMES} or names(layout[2]):
        return None
    before, inner, after = parts(layout[1])
    # An image of one row or column has lost that axis: it is not told from a line of tokens.
    match inner:
        case (Axis("rows", rows), Axis("columns", columns)) if shape_of(node)[1:2] == (
            before + rows * columns + after,
        ):
            return (rows, columns), before, after
    return None


def why_unplaced(node: Node, layouts: Mapping[Node, Layout], hint: Grid | None) -> str:
    """Why :func:`placed` finds nothing, in words."""
    layout = layouts.get(node, ())
    if any({ROWS, COLUMNS} <= names(dim) for dim in layout[1:]):
        return "video: its tokens are frames x rows x columns, or several images; a grid is one image"
    if layout and names(layout[0]) - {FRAMES}:
        return "it attends across images or within windows: rows and columns are in its batch"
    asked = f"grid={hint} does not place them" if hint else "pass grid="
    return f"no grid: the graph does not tell which tokens lie where; {asked}"


def grid_from_hint(hint: Grid, tokens: int) -> Grid | None:
    """The grid of ``tokens`` tokens, as the hint at the finest resolution coarsened by a whole factor; None if none.

    >>> grid_from_hint((64, 32), 512)
    (32, 16)
    """
    scale = math.isqrt(hint[0] * hint[1] // tokens)
    fits = scale > 0 and hint[0] % scale == 0 and hint[1] % scale == 0
    grid = (hint[0] // scale, hint[1] // scale) if fits else (0, 0)
    return grid if grid[0] * grid[1] == tokens else None


def check_form(hint: Any) -> None:
    """Refuse a hint that is no pair of positive integers.

    Raises:
        GridError: with the hint.
    """
    if hint is None:
        return
    pair = isinstance(hint, tuple | list) and len(hint) == 2
    if not (pair and all(map(checks.counts, hint))):
        raise GridError(f"{checks.told('grid', hint)} must be two positive integers (rows, columns), in image tokens")


def check_hint(graph: Graph, hint: Grid, placeable: Mapping[Node, int], unplaced: Sequence[int]) -> None:
    """Refuse a hint that contradicts what the graph says, or that fits no attention.

    Args:
        graph: with ``meta["val"]`` on every node.
        hint: ``(rows, columns)`` at the finest resolution.
        placeable: what the attentions with a grid read, and their numbers of tokens.
        unplaced: the numbers of tokens of self-attentions without one.

    Raises:
        GridError: with the hint, and what would fit.
    """
    layouts = image_layouts(graph)
    seen = {place[0] for node in layouts if (place := placed(node, layouts))}
    open_to_it = [count for node, count in placeable.items() if placed(node, layouts) is None] + [*unplaced]
    fits = any(grid_from_hint(hint, count) for count in open_to_it)
    if tuple(hint) in seen or packed_input(graph, hint) is not None or fits or not (placeable or unplaced):
        return
    if seen:
        finest = max(seen, key=math.prod)
        raise GridError(f"grid={hint!r} contradicts the graph, whose finest image grid is {finest}")
    raise GridError(f"grid={hint!r} has {math.prod(hint)} tokens; the attentions have {sorted(set(open_to_it))}")
