"""Rewrite: a self-attention, or its whole block, among merged tokens.

::

    q, k, v = project(x)                       assign, rep = merge_plan(metric)
    y = way_out(sdpa(q, k, v))          ->     q, k, v = project(merge(x, assign))
    x + y                                      y = unmerge(way_out(sdpa(q, k, v)), assign)
                                               x + y

With proportional attention the logarithm of each group's size is added to its keys' scores.

Text beside the image keeps its place and number, as groups of one; rotary angles and masks are those of ``rep``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch.fx import Node

from bigain_fx.passes.arguments import mask_of
from bigain_fx.passes.axes import aten, parts, shape_of
from bigain_fx.passes.fewer import Fewer, among_all, image_rows, one_behind_another, rows_of_each
from bigain_fx.passes.fused import separated
from bigain_fx.passes.images import Grid
from bigain_fx.passes.methods import BlockPool, MergeMethod
from bigain_fx.passes.ops import complete_cells, window_sides
from bigain_fx.passes.region import Region
from bigain_fx.passes.sites import AttentionSite
from bigain_fx.passes.surgery import BRANCH, Surgeon

bigain = torch.ops.bigain


def tokens_after(site: AttentionSite, method: MergeMethod) -> int:
    """Tokens that are left of all images."""
    return sum(_left(grid, method) for grid in site.grids)


def _left(grid: Grid, method: MergeMethod) -> int:
    """``N - min(int(N * ratio), sources)`` of one image; pooling takes whole cells. One ratio is given."""
    (ratio,) = method.ratios
    tokens, cells = math.prod(grid), math.prod(complete_cells(grid, method.cell))
    folded = int(tokens * ratio)
    if isinstance(method, BlockPool):
        each = math.prod(method.cell) - 1
        return tokens - min(folded // each, cells) * each
    return tokens - min(folded, tokens - cells)


def refuse(site: AttentionSite, method: MergeMethod) -> str | None:
    """Why ``method`` does nothing at ``site``, or None."""
    for grid in site.grids:
        if 0 in complete_cells(grid, method.cell):
            return f"cell {method.cell} is larger than the grid {grid}"
    if tokens_after(site, method) == site.tokens:
        return f"ratio {method.ratios[0]:g} of {site.tokens} tokens merges none"
    if method.proportional and mask_of(site.sdpa) is not None:
        return "proportional: its attention has a mask already"
    if method.proportional and shape_of(site.sdpa)[0] != site.batch:
        return "proportional: batch and heads share a dimension"
    return None


def apply(surgeon: Surgeon, site: AttentionSite, method: MergeMethod) -> AttentionSite:
    """Carry out the rewrite; operands of the SDPA that no longer come from ``x`` stay as they are."""
    regions: Sequence[tuple[Node, Region]] = site.block
    if method.scope == "attention":
        site = separated(surgeon, site, {node for path in site.paths.values() for node in path})
        regions = [(site.x, site.region)]
    left = tokens_after(site, method)
    with surgeon.after(site.x):
        assign, rep, back = _plan(surgeon, site, method)
    for source, region in regions:
        before, _, after = parts(region.layouts[source][1])
        fewer = Fewer(surgeon, region.layouts, left, rep)
        groups = among_all(surgeon, assign, before, after, left)
        with surgeon.after(max(source, groups)):
            merged = surgeon.emit(bigain.merge.default, (source, groups, before + left + after), like=site.sdpa)
        known = {source: merged}
        fewer.replay(region.nodes, known)
        if method.proportional and site.sdpa in known and site.paths["k"]:
            text_before, _, text_after = parts(region.layouts[site.sdpa.args[1]][-2])  # type: ignore[index]
            keys = among_all(surgeon, assign, text_before, text_after, left)
            _weigh(surgeon, known[site.sdpa], keys, text_before + left + text_after)
        for node in known.values():
            node.meta[BRANCH] = merged.name
        for node in region.loose:
            node.replace_all_uses_with(known[node])
        for node in region.exits:
            before, _, after = parts(region.layouts[node][1])
            whole = _unmerge(surgeon, known[node], _all_rows(surgeon, back, before, after, left), like=site.sdpa)
            node.replace_all_uses_with(whole)
    return site


def _weigh(surgeon: Surgeon, sdpa: Node, groups: Node, count: int) -> None:
    """Let each of the ``count`` keys of ``sdpa`` count for its whole group."""

    def logarithms() -> Node:
        sizes = surgeon.emit(bigain.group_sizes.default, (groups, count), like=sdpa)
        return surgeon.emit(aten.log.default, (sizes,), like=sdpa)

    sizes = surgeon.once(("sizes", groups), groups, logarithms)
    with surgeon.graph.inserting_before(sdpa):
        shape = [shape_of(groups)[0], *[1] * (len(shape_of(sdpa)) - 2), count]
        mask = surgeon.emit(aten.reshape.default, (sizes, shape), like=sdpa)
        mask = surgeon.emit(aten.to.dtype, (mask, sdpa.meta["val"].dtype), like=sdpa)
    sdpa.args = (*sdpa.args[:3], mask, *sdpa.args[4:])
    sdpa.kwargs = {name: value for name, value in sdpa.kwargs.items() if name != "attn_mask"}


def _plan(surgeon: Surgeon, site: AttentionSite, method: MergeMethod) -> tuple[Node, Node, tuple[Node, ...]]:
    """``assign (B, N)``, ``rep (B, left)``, or ``(1, left)`` where samples share one plan, and what unmerging reads.

    Each image has a plan of its own, and takes its groups back from its own; the maps stand one behind another.
    """
    emit = surgeon.emit
    metric = site.metric.source
    for view in site.metric.views:
        metric = emit(view.target, (metric, *view.args[1:]), like=view, kwargs=view.kwargs)
    metric = image_rows(surgeon, metric, site.before, site.after)
    shared = method.align == "batch" and site.batch > 1
    if shared:
        swapped = emit(aten.transpose.int, (metric, 0, 1), like=site.sdpa)
        metric = emit(aten.reshape.default, (swapped, [1, site.tokens, -1]), like=site.sdpa)
    plans = [
        _plan_image(surgeon, site, method, rows, grid)
        for rows, grid in zip(rows_of_each(surgeon, metric, site.grids), site.grids, strict=True)
    ]
    sizes, groups = [math.prod(grid) for grid in site.grids], [_left(grid, method) for grid in site.grids]
    assigns, reps, *nears = zip(*plans, strict=True)
    assign = one_behind_another(surgeon, assigns, 1, groups)
    rep = one_behind_another(surgeon, reps, 1, sizes)
    maps = [assign]
    if nears:
        near, weight = (_as_many(surgeon, items) for items in nears)
        maps += [one_behind_another(surgeon, near, 2, groups), one_behind_another(surgeon, weight, 2)]
    if shared:
        maps = [emit(aten.expand.default, (each, [site.batch, *shape_of(each)[1:]]), like=site.sdpa) for each in maps]
    return maps[0], rep, tuple(maps[1:] or maps)


def _plan_image(
    surgeon: Surgeon, site: AttentionSite, method: MergeMethod, metric: Node, grid: Grid
) -> tuple[Node, ...]:
    """``assign``, ``rep``, and what blending reads where it is asked for, of one image with this ``metric``."""
    emit = surgeon.emit
    where, folded = (metric, list(grid), list(method.cell)), math.prod(grid) - _left(grid, method)
    if isinstance(method, BlockPool):
        plan = emit(bigain.pool_plan.default, (*where, folded // (math.prod(method.cell) - 1)), like=site.sdpa)
    else:
        position = method.destinations.emit(surgeon, metric, grid, method.cell, like=site.sdpa)
        window = list(window_sides(grid, method.cell, method.window))
        plan = emit(bigain.merge_plan.default, (*where, folded, position, window), like=site.sdpa)
    assign, rep = surgeon.item(plan, 0), surgeon.item(plan, 1)
    if method.unmerge != "blend":
        return assign, rep
    nearest = emit(bigain.nearest_groups.default, (metric, assign, rep), like=site.sdpa)
    return assign, rep, surgeon.item(nearest, 0), surgeon.item(nearest, 1)


def _as_many(surgeon: Surgeon, each: Sequence[Node]) -> list[Node]:
    """``each (B, k, N)`` for as many groups: an image of fewer takes its first one once more, at weight 0."""
    most = max(shape_of(item)[1] for item in each)
    return [
        item if (missing := most - shape_of(item)[1]) == 0
        else surgeon.emit(aten.constant_pad_nd.default, (item, [0, 0, 0, missing]), like=item)
        for item in each
    ]  # fmt: skip


def _all_rows(surgeon: Surgeon, back: tuple[Node, ...], before: int, after: int, left: int) -> tuple[Node, ...]:
    """The maps ``back`` of the image, for all rows: each row beside the image takes itself."""
    index, *weights = back
    if not weights or not before + after:
        return among_all(surgeon, index, before, after, left), *weights
    samples, count, tokens = shape_of(index)

    def reshaped(source: Node, shape: list[int]) -> Node:
        make = partial(surgeon.emit, aten.reshape.default, (source, shape), like=index)
        return surgeon.once((source, *shape), source, make)

    rows = among_all(surgeon, reshaped(index, [samples * count, tokens]), before, after, left)
    make = partial(surgeon.emit, aten.constant_pad_nd.default, (weights[0], [before, after]), like=index)
    return reshaped(rows, [samples, count, -1]), surgeon.once((weights[0], before, after), weights[0], make)


def _unmerge(surgeon: Surgeon, merged: Node, maps: tuple[Node, ...], like: Node) -> Node:
    """All rows of ``merged (B, rows, ...)`` again."""
    features = list(shape_of(merged)[2:])
    target = bigain.unmerge.default if len(maps) == 1 else bigain.blend.default
    with surgeon.after(max(merged, *maps)):
        rows = merged if len(features) == 1 else surgeon.emit(aten.flatten.using_ints, (merged, 2), like=merged)
        whole = surgeon.emit(target, (rows, *maps), like)
        return whole if len(features) == 1 else surgeon.emit(aten.unflatten.int, (whole, 2, features), like=merged)
