"""Which tokens lie on which ``(h, w)`` grid, read from the graph.

The rows and columns of every 4-D feature map are followed, by the rules of :mod:`bigain_fx.passes.rules`, through the
flatten, the patch embedding, residual adds, norms, attention and the company of text to wherever tokens are used. The
tokens of several images, one behind another, are followed as one axis; their grids are given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch.fx import Graph, Node

from bigain_fx.passes.arguments import SDPA
from bigain_fx.passes.axes import Axis, Dim, Layout, Refusal, aten, named, names, parts, shape_of
from bigain_fx.passes.errors import GridError
from bigain_fx.passes.images import Grids, as_hint, tokens_on
from bigain_fx.passes.memory import descendants
from bigain_fx.passes.rules import PLACE_BY_PLACE, forget, propagate

FRAMES, ROWS, COLUMNS, IMAGES = "frames", "rows", "columns", "images"
CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding})


def image_layouts(graph: Graph, hint: Grids | None = None) -> dict[Node, Layout]:
    """Layout of every node in which rows and columns of an image, or the tokens of several, could be followed.

    Args:
        graph: with ``meta["val"]`` on every node.
        hint: of the images whose tokens the first input is, where that is ``(B, tokens, C)``.
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
            layout = (named("", shape[0]), _packed(hint), named("", shape[2]))
        elif node in samples or (node.target in CONVOLUTIONS and node in sampled):
            layout = _feature_map(shape)
        elif node.target is SDPA:
            layout = (*layouts[node.args[0]][:-1], named("", shape[-1])) if node.args[0] in layouts else None
        elif node.target in PLACE_BY_PLACE:
            layout = layouts.get(node.args[0])
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


def packed_input(graph: Graph, hint: Grids | None) -> Node | None:
    """The first input, if it is the tokens of images with the grids ``hint``: ``(B, tokens, C)``."""
    if hint is None:
        return None
    return next((node for node in sample_inputs(graph)[:1] if shape_of(node)[1:-1] == (tokens_on(hint),)), None)


def _packed(grids: Grids) -> Dim:
    """One image is rows x columns; of several, the tokens are followed as one axis."""
    if len(grids) > 1:
        return named(IMAGES, tokens_on(grids))
    return named(ROWS, grids[0][0]) + named(COLUMNS, grids[0][1])


def _feature_map(shape: tuple[int, ...]) -> Layout | None:
    if len(shape) not in (4, 5):
        return None
    frames = [named(FRAMES, size) for size in shape[2:-2]]
    return (named("", shape[0]), named("", shape[1]), *frames, named(ROWS, shape[-2]), named(COLUMNS, shape[-1]))


def placed(node: Node, layouts: Mapping[Node, Layout], hint: Grids | None = None) -> tuple[Grids, int, int] | None:
    """The grids of the images among the rows of ``node (B, rows, C)``, and the number of rows before and after them."""
    layout = layouts.get(node)
    if layout is None or len(layout) != 3 or names(layout[0]) - {FRAMES} or names(layout[2]):
        return None
    before, inner, after = parts(layout[1])
    grids: Grids = ()
    # An image of one row or column has lost that axis: it is not told from a line of tokens.
    match inner:
        case (Axis("rows", rows), Axis("columns", columns)):
            grids = ((rows, columns),)
        case (Axis("images", _),) if hint:
            grids = hint
    whole = shape_of(node)[1:2] == (before + tokens_on(grids) + after,)  # not so of what has several results
    return (grids, before, after) if grids and whole else None


def why_unplaced(node: Node, layouts: Mapping[Node, Layout], hint: Grids | None) -> str:
    """Why :func:`placed` finds nothing, in words."""
    layout = layouts.get(node, ())
    if any({ROWS, COLUMNS} <= names(dim) for dim in layout[1:]):
        return "video: its tokens are frames x rows x columns, or several images; a grid is one image"
    if layout and names(layout[0]) - {FRAMES}:
        return "it attends across images or within windows: rows and columns are in its batch"
    asked = f"grid={as_hint(hint)} does not place them" if hint else "pass grid="
    return f"no grid: the graph does not tell which tokens lie where; {asked}"


def grids_from_hint(hint: Grids, tokens: int) -> Grids | None:
    """The grids of ``tokens`` tokens, as the hint at the finest resolution coarsened by a whole factor; None if none.

    >>> grids_from_hint(((64, 32),), 512)
    ((32, 16),)
    """
    scale = math.isqrt(tokens_on(hint) // tokens)
    if scale == 0 or any(side % scale for grid in hint for side in grid):
        return None
    grids = tuple((rows // scale, columns // scale) for rows, columns in hint)
    return grids if tokens_on(grids) == tokens else None


def check_hint(graph: Graph, hint: Grids, placeable: Mapping[Node, int], unplaced: Sequence[int]) -> None:
    """Refuse a hint that contradicts what the graph says, or that fits no attention.

    Args:
        graph: with ``meta["val"]`` on every node.
        hint: the grids at the finest resolution.
        placeable: what the attentions with a grid read, and their numbers of tokens.
        unplaced: the numbers of tokens of self-attentions without one.

    Raises:
        GridError: with the hint, and what would fit.
    """
    layouts = image_layouts(graph)
    seen = {place[0] for node in layouts if (place := placed(node, layouts))}
    open_to_it = [count for node, count in placeable.items() if placed(node, layouts) is None] + [*unplaced]
    fits = any(grids_from_hint(hint, count) for count in open_to_it)
    if hint in seen or packed_input(graph, hint) is not None or fits or not (placeable or unplaced):
        return
    if seen:
        finest = as_hint(max(seen, key=tokens_on))
        raise GridError(f"grid={as_hint(hint)!r} contradicts the graph, whose finest image grid is {finest}")
    raise GridError(
        f"grid={as_hint(hint)!r} has {tokens_on(hint)} tokens; the attentions have {sorted(set(open_to_it))}"
    )
