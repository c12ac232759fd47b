"""Merging tokens along a plan, and giving each of them its group's result back."""

from __future__ import annotations

import torch
from torch import Tensor

from bigain_fx.passes.ops.kernels import take


def merge(x: Tensor, assign: Tensor, groups: int) -> Tensor:
    """Mean of each group of tokens (``docs/operators.md``, "Merge").

    Args:
        x: ``(B, N, C)`` floating; averaged in float32.
        assign: ``(B, N)`` int64 into ``[0, groups)``, every group non-empty.
        groups: ``M``, the number of groups.

    Returns:
        ``(B, M, C)`` in ``x``'s dtype.
    """
    batch, tokens, channels = x.shape
    # Sorting tokens by group turns the scatter into a bag mean: contiguous, without atomics, and deterministic.
    offset = torch.arange(batch, device=x.device).unsqueeze(1) * groups
    group, order = (assign + offset).flatten().sort(stable=True)
    starts = torch.searchsorted(group, torch.arange(batch * groups, device=x.device))
    if take(x):
        averaged: Tensor = torch.ops.bigain.segment_mean(x, order, starts)
        return averaged
    rows = x.float().reshape(batch * tokens, channels)
    mean: Tensor = torch.ops.aten._embedding_bag(rows, order, starts, False, 1)[0]
    return mean.view(batch, groups, channels).to(x.dtype)


def group_sizes(assign: Tensor, groups: int) -> Tensor:
    """How many tokens each group has: ``assign (B, N)`` int64 into ``[0, groups)`` -> ``(B, groups)`` float32."""
    ones = torch.ones(assign.shape, device=assign.device)
    return torch.zeros(assign.shape[0], groups, device=assign.device).scatter_add(1, assign, ones)


def unmerge(y: Tensor, assign: Tensor) -> Tensor:
    """Give each token its group's row: ``y (B, M, C)``, ``assign (B, N)`` int64 -> ``(B, N, C)``, dtype kept."""
    return y.gather(1, assign.unsqueeze(-1).expand(-1, -1, y.shape[-1]))


def blend(y: Tensor, near: Tensor, weight: Tensor) -> Tensor:
    """Give each token a mean of the rows of several groups (``docs/operators.md``, "Unmerge").

    Args:
        y: ``(B, M, C)`` floating; averaged in float32.
        near: ``(B, k, N)`` int64 into ``[0, M)``, the groups.
        weight: ``(B, k - 1, N)`` float32, of all but the first, which takes the rest.

    Returns:
        ``(B, N, C)`` in ``y``'s dtype.
    """
    rows = [unmerge(y, index).float() for index in near.unbind(1)]
    mean = rows[0]
    for row, share in zip(rows[1:], weight.unbind(1), strict=True):
        mean = mean + share.unsqueeze(-1) * (row - rows[0])
    return mean.to(y.dtype)
