"""The operators, in plain torch, and their registration as ``torch.ops.bigain.*``.

Each is registered with a CompositeImplicitAutograd kernel: it stays one node in a captured graph, and AOTAutograd
decomposes it, so that inductor fuses through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bigain_fx.passes.ops.kv import downsampled_grid, kv_downsample, linear_alpha, nearest_tokens
from bigain_fx.passes.ops.merge import blend, group_sizes, merge, unmerge
from bigain_fx.passes.ops.plan import merge_plan, nearest_groups, pool_plan
from bigain_fx.passes.ops.score import cell_tokens, complete_cells, laplacian_score, window_sides

SCHEMAS: dict[str, Callable[..., Any]] = {
    "merge_plan(Tensor metric, int[2] grid, int[2] cell, int merged, Tensor? position=None, int[2]? window=None)"
    " -> (Tensor assign, Tensor rep)": merge_plan,
    "pool_plan(Tensor metric, int[2] grid, int[2] cell, int pooled) -> (Tensor assign, Tensor rep)": pool_plan,
    "merge(Tensor x, Tensor assign, int groups) -> Tensor": merge,
    "group_sizes(Tensor assign, int groups) -> Tensor": group_sizes,
    "nearest_groups(Tensor metric, Tensor assign, Tensor rep) -> (Tensor near, Tensor weight)": nearest_groups,
    "blend(Tensor y, Tensor near, Tensor weight) -> Tensor": blend,
    "unmerge(Tensor y, Tensor assign) -> Tensor": unmerge,
    "kv_downsample(Tensor x, float alpha, int[2] grid, int factor) -> Tensor": kv_downsample,
    "kv_downsample.Tensor(Tensor x, Tensor alpha, int[2] grid, int factor) -> Tensor": kv_downsample,
    "linear_alpha(Tensor timestep, int batch, float noisy, float clean, float t_noisy, float t_clean)"
    " -> Tensor": linear_alpha,
}

for _schema, _kernel in SCHEMAS.items():
    _name, _, _signature = _schema.partition("(")
    torch.library.define(f"bigain::{_name}", f"({_signature}", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"bigain::{_name}", "CompositeImplicitAutograd", _kernel)

PLANS = frozenset({torch.ops.bigain.merge_plan.default, torch.ops.bigain.pool_plan.default})
"""What decides which tokens go."""
DECIDING = PLANS | {torch.ops.bigain.nearest_groups.default}
"""What is worked out from the metric alone, once for each attention."""

__all__ = [
    "DECIDING", "PLANS",
    "blend", "cell_tokens", "complete_cells", "downsampled_grid", "group_sizes", "kv_downsample", "laplacian_score",
    "linear_alpha", "merge", "merge_plan", "nearest_groups", "nearest_tokens", "pool_plan", "unmerge", "window_sides",
]  # fmt: skip
