"""Rewrite: a self-attention among merged tokens.

::

    q, k, v = project(x)                       assign, rep = merge_plan(metric)
    y = way_out(sdpa(q, k, v))          ->     q, k, v = project(merge(x, assign))
    x + y                                      y = unmerge(way_out(sdpa(q, k, v)), assign)
                                               x + y
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from bigain_fx.passes.grid import Grid
from bigain_fx.passes.methods import MergeMethod, ToMe
from bigain_fx.passes.ops import complete_cells, random_positions
from bigain_fx.passes.sites import AttentionSite
from bigain_fx.passes.surgery import Surgeon

bigain = torch.ops.bigain


def tokens_after(site: AttentionSite, grid: Grid, method: MergeMethod) -> int:
    """Tokens that are left: ``N - min(int(N * ratio), sources)``."""
    sources = site.tokens - math.prod(complete_cells(grid, method.cell))
    return site.tokens - min(int(site.tokens * method.ratio), sources)


def refuse(site: AttentionSite, grid: Grid, method: MergeMethod) -> str | None:
    """Why ``method`` does nothing at ``site``, or None."""
    if 0 in complete_cells(grid, method.cell):
        return f"cell {method.cell} is larger than the grid {grid}"
    if tokens_after(site, grid, method) == site.tokens:
        return f"ratio {method.ratio:g} of {site.tokens} tokens merges none"
    return None


def apply(surgeon: Surgeon, site: AttentionSite, grid: Grid, method: MergeMethod) -> AttentionSite:
    """Carry out the rewrite; operands of the SDPA that no longer come from ``x`` stay as they are."""
    left = tokens_after(site, grid, method)
    with surgeon.graph.inserting_before(site.sdpa):
        metric = site.x
        if site.norm is not None:
            source: Node = site.norm.args[0]  # type: ignore[assignment]
            metric = surgeon.replay(site.metric, {site.norm: source}, {}, left, left).get(site.x, source)
        position = None
        if isinstance(method, ToMe):
            offsets = random_positions(grid, method.cell, method.seed)
            if method.destination == "top-left":
                offsets = torch.zeros_like(offsets)
            name = f"bigain_positions_{grid[0]}x{grid[1]}"
            position = surgeon.constant(name, offsets, like=site.sdpa)
        args = (metric, list(grid), list(method.cell), site.tokens - left, position)
        plan = surgeon.emit(bigain.merge_plan.default, args, like=site.sdpa)
        assign = surgeon.item(plan, 0)
        tokens = surgeon.emit(bigain.merge.default, (site.x, assign, left), like=site.sdpa)
        inner = sorted({node for path in site.paths.values() for node in path})
        known = surgeon.replay(inner, {site.x: tokens}, site.layouts, site.tokens, left)
    after = site.exit.next
    with surgeon.graph.inserting_before(after):
        known = surgeon.replay(site.output, known, site.layouts, site.tokens, left)
        whole = surgeon.emit(bigain.unmerge.default, (known[site.exit], assign), like=site.sdpa)
    site.exit.replace_all_uses_with(whole)
    return site
