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
from typing import Any

import torch
from torch.fx import Node

from bigain_fx.passes.axes import shape_of
from bigain_fx.passes.errors import RewriteError
from bigain_fx.passes.grid import Grid
from bigain_fx.passes.methods import KVMethod, LinearAlpha
from bigain_fx.passes.sites import AttentionSite
from bigain_fx.passes.surgery import Surgeon

bigain = torch.ops.bigain
TIMESTEP_INPUTS = ("timestep", "timesteps", "t")


def refuse(site: AttentionSite, grid: Grid, method: KVMethod) -> str | None:
    """Why ``method`` does nothing at ``site``, or None."""
    if any(side % method.factor for side in grid):
        return f"factor {method.factor} does not divide the grid {grid}"
    return None


def tokens_after(site: AttentionSite, grid: Grid, method: KVMethod) -> int:
    """Keys and values that are left."""
    return site.tokens // method.factor**2


def apply(surgeon: Surgeon, site: AttentionSite, grid: Grid, method: KVMethod) -> AttentionSite:
    """Carry out the rewrite; the site that is left has keys and values that no longer come from ``x``."""
    left = tokens_after(site, grid, method)
    with surgeon.graph.inserting_before(site.sdpa):
        alpha: Any = method.alpha
        overload = bigain.kv_downsample.default
        if isinstance(alpha, LinearAlpha):
            ends = [float(end) for end in (alpha.noisy, alpha.clean, alpha.t_noisy, alpha.t_clean)]
            timestep = _timestep(surgeon, site, alpha)
            alpha = surgeon.emit(bigain.linear_alpha.default, (timestep, site.batch, *ends), like=site.sdpa)
            overload = bigain.kv_downsample.Tensor
        tokens = surgeon.emit(overload, (site.x, alpha, list(grid), method.factor), like=site.sdpa)
        inner = sorted({*site.paths["k"], *site.paths["v"]})
        known = surgeon.replay(inner, {site.x: tokens}, site.layouts, site.tokens, left)
    query, key, value = site.sdpa.args[:3]
    site.sdpa.args = (query, known[key], known[value], *site.sdpa.args[3:])  # type: ignore[index]
    return replace(site, paths={**site.paths, "k": (), "v": ()})


def _timestep(surgeon: Surgeon, site: AttentionSite, alpha: LinearAlpha) -> Node:
    inputs: dict[str, Node] = {node.target: node for node in surgeon.graph.nodes if node.op == "placeholder"}
    found = next((inputs[name] for name in TIMESTEP_INPUTS if name in inputs), None)
    if found is None:
        raise RewriteError(
            f"alpha={alpha!r} needs the timestep, but none of the model's inputs {sorted(inputs)} is called "
            f"{' or '.join(TIMESTEP_INPUTS)}; use a constant alpha"
        )
    if math.prod(shape_of(found)) not in (1, site.batch) or len(shape_of(found)) > 1:
        raise RewriteError(
            f"alpha={alpha!r} needs a timestep of shape () or ({site.batch},) at {site.name}; "
            f"input {found.target!r} has shape {shape_of(found)}"
        )
    return found
