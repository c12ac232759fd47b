"""Rewrite: keys and values from downsampled tokens.

::

    k, v = project(x)                          d = kv_downsample(x, alpha)
    sdpa(q, k, v)                       ->     k, v = project(d)
                                               sdpa(q, k, v)

Queries stay whole. A constant alpha is a literal; a schedule is computed from the timestep input, one alpha a sample.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bigain_fx.passes.alpha import LinearAlpha
from bigain_fx.passes.arguments import mask_of
from bigain_fx.passes.axes import aten, shape_of
from bigain_fx.passes.errors import RewriteError
from bigain_fx.passes.fewer import Fewer, image_rows, one_behind_another, rows_of_each
from bigain_fx.passes.fused import separated
from bigain_fx.passes.images import Grids, text_of
from bigain_fx.passes.memory import written_by
from bigain_fx.passes.methods import KVMethod
from bigain_fx.passes.ops import downsampled_grid, nearest_tokens
from bigain_fx.passes.sites import AttentionSite
from bigain_fx.passes.surgery import Surgeon

bigain = torch.ops.bigain
TIMESTEP_INPUTS = ("timestep", "timesteps", "t")


def refuse(site: AttentionSite, method: KVMethod) -> str | None:
    """Why ``method`` does nothing at ``site``, or None."""
    if site.tokens == 1:
        return "its image is one token"
    timestep = _timestep_input(site.sdpa.graph) if isinstance(method.alpha, LinearAlpha) else None
    if timestep and (writer := written_by(timestep, site.x)):
        return f"alpha: {timestep.name} is changed in place by {writer.name}"
    return None


def tokens_after(site: AttentionSite, method: KVMethod) -> int:
    """Keys and values of image tokens that are left."""
    return sum(math.prod(downsampled_grid(grid, method.factor)) for grid in site.grids)


def apply(surgeon: Surgeon, site: AttentionSite, method: KVMethod) -> AttentionSite:
    """Carry out the rewrite; the site that is left has keys and values that no longer come from ``x``."""
    site = separated(surgeon, site, {*site.paths["k"], *site.paths["v"]})
    left = tokens_after(site, method)
    sdpa, (query, key, value) = site.sdpa, site.sdpa.args[:3]
    with surgeon.after(site.x):
        alpha: Any = method.alpha
        overload = bigain.kv_downsample.default
        if isinstance(alpha, LinearAlpha):
            timestep = _timestep(surgeon, site, alpha)
            alpha = surgeon.emit(bigain.linear_alpha.default, (timestep, site.batch, *alpha.ends), like=sdpa)
            overload = bigain.kv_downsample.Tensor
        images = rows_of_each(surgeon, image_rows(surgeon, site.x, site.before, site.after), site.grids)
        each = [
            surgeon.emit(overload, (rows, alpha, list(grid), method.factor), like=sdpa)
            for rows, grid in zip(images, site.grids, strict=True)
        ]
        known = {site.x: _beside(surgeon, site, one_behind_another(surgeon, each, 1))}
        rep = surgeon.constant(f"bigain_nearest_{text_of(site.grids, '_')}_{method.factor}",
                               _nearest(site.grids, method.factor), like=sdpa)  # fmt: skip
    fewer = Fewer(surgeon, site.layouts, left, rep)
    fewer.replay(sorted({*site.paths["k"], *site.paths["v"]}), known)
    mask = mask_of(sdpa)
    if mask and shape_of(mask)[-1] > 1:
        with surgeon.graph.inserting_before(sdpa):
            mask = fewer.pick(mask, (-1,), (*site.layouts[sdpa][:-1], site.layouts[key][-2]))  # type: ignore[index]
    sdpa.args = (query, known[key], known[value], mask, *sdpa.args[4:])  # type: ignore[index]
    sdpa.kwargs = {name: value for name, value in sdpa.kwargs.items() if name != "attn_mask"}
    layouts = {node: layout for node, layout in site.layouts.items() if node not in (key, value)}
    return replace(site, paths={**site.paths, "k": (), "v": ()}, layouts=layouts)


def _nearest(grids: Grids, factor: int) -> Tensor:
    """The nearest token of each block of every image, ``(1, left)`` int64."""
    starts = [0, *accumulate(map(math.prod, grids))]
    each = [nearest_tokens(grid, factor) + start for grid, start in zip(grids, starts, strict=False)]
    return torch.cat(each).unsqueeze(0)


def _beside(surgeon: Surgeon, site: AttentionSite, image: Node) -> Node:
    """``image`` between the rows of ``site.x`` that stand before and behind it."""
    rows = shape_of(site.x)[1]
    ends = ((0, site.before), (rows - site.after, rows))
    text = [surgeon.emit(aten.slice.Tensor, (site.x, 1, *end), like=site.x) for end in ends if end[0] < end[1]]
    joined = [*text[: bool(site.before)], image, *text[bool(site.before) :]]
    return surgeon.emit(aten.cat.default, (joined, 1), like=site.x) if text else image


def _timestep(surgeon: Surgeon, site: AttentionSite, alpha: LinearAlpha) -> Node:
    found = _timestep_input(surgeon.graph)
    if found is None:
        inputs = sorted(str(node.target) for node in surgeon.graph.find_nodes(op="placeholder"))
        raise RewriteError(
            f"alpha={alpha!r} needs the timestep, but none of the model's inputs {inputs} is called "
            f"{' or '.join(TIMESTEP_INPUTS)}; use a constant alpha"
        )
    if math.prod(shape_of(found)) not in (1, site.batch) or len(shape_of(found)) > 1:
        raise RewriteError(
            f"alpha={alpha!r} needs a timestep of shape () or ({site.batch},) at {site.name}; "
            f"input {found.target!r} has shape {shape_of(found)}"
        )
    return found


def _timestep_input(graph: Graph) -> Node | None:
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    return next((inputs[name] for name in TIMESTEP_INPUTS if name in inputs), None)
