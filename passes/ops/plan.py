"""Which tokens merge: the plan, two integer maps made from a metric on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bigain_fx.passes.ops.kernels import take
from bigain_fx.passes.ops.merge import merge
from bigain_fx.passes.ops.score import cell_tokens, laplacian_score, lowest_scoring

NEAREST, SHARPNESS = 3, 5.0
"""How many groups are blended, and how fast their weights fall with the similarity."""


def merge_plan(
    metric: Tensor,
    grid: Sequence[int],
    cell: Sequence[int],
    merged: int,
    position: Tensor | None = None,
    window: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Decide which ``merged`` tokens fold into which destination (``docs/operators.md``, "Plan").

    Args:
        metric: ``(B, N, C)`` floating; compared in float32 by cosine similarity.
        grid: ``(h, w)`` with ``h * w == N``.
        cell: ``(rows, columns)``; each complete cell holds one destination.
        merged: number of sources that merge, at most the number of tokens that are no destination.
        position: ``(cells,)`` or ``(B, cells)`` int64, the destination's offset in each cell; None elects the token
            of lowest Laplacian score.
        window: ``(rows, columns)`` that divide the grid and hold whole cells (:func:`window_sides`): a source merges
            within its window. None is the whole grid.

    Returns:
        ``assign (B, N)`` int64 into ``[0, M)`` and ``rep (B, M)`` int64 into ``[0, N)``, ``M = N - merged``.
        Destinations come first, window by window and in token order, then the tokens that stand alone.
    """
    batch, tokens, channels = metric.shape
    members = cell_tokens(grid, cell, metric.device)
    if position is None:
        position, norm = _score_and_elect(metric, grid, cell)
    else:
        position, norm = position.expand(batch, -1), _norm(metric)
    elected = members.expand(batch, -1, -1).gather(2, position.unsqueeze(-1)).squeeze(-1)
    # Destinations lifted above all others: a sort lists the sources of each window, then its destinations.
    index = torch.arange(tokens, device=metric.device).expand(batch, -1)
    lifted = index.scatter(1, elected, elected + tokens)
    windows = cell_tokens(grid, grid if window is None else window, metric.device)
    each = len(members) // len(windows)
    sources, destinations = lifted[:, windows].sort(-1).values.tensor_split([windows.shape[1] - each], -1)
    sources, destinations = sources.flatten(1), destinations.flatten(1) - tokens

    apart = (batch * len(windows), -1)
    similarity, match = _nearest(
        _rows(metric, sources).view(*apart, channels), _rows(metric, destinations).view(*apart, channels),
        norm.gather(1, sources).view(apart), norm.gather(1, destinations).view(apart),
    )  # fmt: skip
    first = torch.arange(0, len(members), each, device=metric.device).view(-1, 1)
    match = (match.view(batch, len(windows), -1) + first).flatten(1)
    ranked = similarity.view(batch, -1).argsort(dim=1, descending=True, stable=True)
    folded, alone = ranked.tensor_split([merged], 1)

    rep = torch.cat([destinations, sources.gather(1, alone)], 1)
    group = torch.arange(rep.shape[1], device=metric.device).expand_as(rep)
    assign = torch.zeros_like(index).scatter(1, rep, group)
    return assign.scatter(1, sources.gather(1, folded), match.gather(1, folded)), rep


def pool_plan(metric: Tensor, grid: Sequence[int], cell: Sequence[int], pooled: int) -> tuple[Tensor, Tensor]:
    """Fold the smoothest cells whole (``docs/operators.md``, "Pooling whole cells").

    Args:
        metric: ``(B, N, C)`` floating.
        grid: ``(h, w)`` with ``h * w == N``.
        cell: ``(rows, columns)``.
        pooled: how many complete cells fold: those whose highest Laplacian score is lowest, the first on a tie.

    Returns:
        ``assign (B, N)`` int64 into ``[0, M)`` and ``rep (B, M)`` int64 into ``[0, N)``, ``M = N - pooled * (rows *
        columns - 1)``. Pooled cells come first, with their first token as ``rep``, then the tokens that stand alone.
    """
    batch, tokens, _ = metric.shape
    members = cell_tokens(grid, cell, metric.device)
    size = members.shape[1]
    roughest = laplacian_score(metric, grid)[:, members].amax(-1)
    folded = members[roughest.argsort(dim=1, stable=True)[:, :pooled]].flatten(1)
    is_folded = torch.zeros(batch, tokens, dtype=torch.int32, device=metric.device).scatter(1, folded, 1)
    alone = is_folded.argsort(dim=1, stable=True)[:, : tokens - pooled * size]
    rep = torch.cat([folded[:, ::size], alone], 1)
    group = torch.arange(rep.shape[1], device=metric.device).expand_as(rep)
    assign = torch.zeros_like(is_folded, dtype=torch.int64).scatter(1, rep, group)
    return assign.scatter(1, folded, group[:, :pooled].repeat_interleave(size, 1)), rep


def nearest_groups(metric: Tensor, assign: Tensor, rep: Tensor) -> tuple[Tensor, Tensor]:
    """Which groups a token that merged away resembles most (``docs/operators.md``, "Unmerge").

    Args:
        metric: ``(B, N, C)`` floating; averaged over each group, and compared in float32 by cosine similarity.
        assign, rep: the plan, ``(B, N)`` and ``(B, M)`` int64.

    Returns:
        ``near (B, k, N)`` int64 into ``[0, M)``, the most similar first, ``k = min(3, M)``, and ``weight (B, k - 1,
        N)`` float32, of all but the first. A token of ``rep`` has its own group, and no weight on another.
    """
    (batch, tokens), groups = assign.shape, rep.shape[1]
    is_rep = torch.zeros_like(assign, dtype=torch.int32).scatter(1, rep, 1)
    folded = is_rep.argsort(dim=1, stable=True)[:, : tokens - groups]
    count = min(NEAREST, groups)
    with _no_autocast(metric.device.type):
        means, rows = merge(metric.float(), assign, groups), _rows(metric, folded)
        similarity, index = (_unit(rows, _norm(rows)) @ _unit(means, _norm(means)).mT).topk(count)
    weight = (SHARPNESS * similarity).softmax(-1)[..., 1:]
    where = folded.unsqueeze(1)
    near = assign.unsqueeze(1).repeat(1, count, 1).scatter(2, where.expand(-1, count, -1), index.mT)
    none = torch.zeros(batch, count - 1, tokens, device=metric.device)
    return near, none.scatter(2, where.expand(-1, count - 1, -1), weight.mT)


def _score_and_elect(metric: Tensor, grid: Sequence[int], cell: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Position of each cell's destination, ``(B, cells)`` int64, and each token's norm, ``(B, N)`` float32."""
    if take(metric):
        position, norm = torch.ops.bigain.score_and_elect(metric, grid, cell)
        return position, norm
    return lowest_scoring(laplacian_score(metric, grid), grid, cell), _norm(metric)


def _nearest(
    sources: Tensor, destinations: Tensor, source_norm: Tensor, destination_norm: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosine similarity of each source with the most similar destination, and which that is: ``(B, S)`` each."""
    if take(sources):
        similarity, match = torch.ops.bigain.nearest(sources, destinations, source_norm, destination_norm)
        return similarity, match
    with _no_autocast(sources.device.type):
        return (_unit(sources, source_norm) @ _unit(destinations, destination_norm).mT).max(-1)


def _norm(tokens: Tensor) -> Tensor:
    length: Tensor = tokens.float().norm(dim=-1)
    return length


def _unit(tokens: Tensor, norm: Tensor) -> Tensor:
    return tokens.float() / norm.clamp_min(1e-12).unsqueeze(-1)


def _no_autocast(device: str) -> AbstractContextManager[object]:
    """Similarities are float32 under autocast too, which would round the factors of a matrix product."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
