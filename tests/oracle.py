"""Naive loop versions of the operators, the reference that every test of the operators is judged by.

Written from the description of BiGain (arXiv 2603.12240) alone: loops over samples, tokens, cells and blocks, numpy
float32, no code shared with the package. Tokens are row-major on a grid ``(rows, columns)``. A plan is a `Plan`; the
order of its groups means nothing, so compare plans with `Plan.token_map`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """A partition of the tokens: ``assign`` (B, N) int64 in [0, M) and ``rep`` (B, M) int64 in [0, N)."""

    assign: Tensor
    rep: Tensor

    def token_map(self) -> list[list[int]]:
        """The representative of each token's group, per sample: equal for plans that differ in group order alone."""
        return token_map(self.assign, self.rep)


def token_map(assign: Tensor, rep: Tensor) -> list[list[int]]:
    """``rep[assign[token]]`` for every sample and token, as lists of int."""
    return [[int(rep[b, group]) for group in assign[b]] for b in range(assign.shape[0])]


def lone_tokens(assign: Tensor) -> list[set[int]]:
    """The tokens that are alone in their group, per sample."""
    lone = []
    for row in assign.tolist():
        sizes: dict[int, int] = {}
        for group in row:
            sizes[group] = sizes.get(group, 0) + 1
        lone.append({token for token, group in enumerate(row) if sizes[group] == 1})
    return lone


def laplacian_score(metric: Tensor, grid: Pair) -> Tensor:
    """Sum over channels of |3x3 Laplacian| with zero padding: (B, N, C) -> (B, N) float32."""
    values = _numpy(metric)
    rows, columns = grid
    scores = np.zeros(values.shape[:2], np.float32)
    for b in range(values.shape[0]):
        for row in range(rows):
            for column in range(columns):
                response = np.float32(-4) * values[b, row * columns + column]
                for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                    i, j = row + down, column + right
                    if 0 <= i < rows and 0 <= j < columns:
                        response = response + values[b, i * columns + j]
                scores[b, row * columns + column] = np.abs(response).sum()
    return torch.from_numpy(scores)


def cell_tokens(grid: Pair, cell: Pair) -> list[list[int]]:
    """The tokens of each complete cell, cells and tokens row-major."""
    rows, columns = grid
    return [
        [
            (top * cell[0] + down) * columns + left * cell[1] + right
            for down in range(cell[0])
            for right in range(cell[1])
        ]
        for top in range(rows // cell[0])
        for left in range(columns // cell[1])
    ]


def destinations(score: Tensor, grid: Pair, cell: Pair, positions: Sequence[int] | None = None) -> list[list[int]]:
    """The destination of each complete cell, per sample.

    ``positions`` gives the offset in each cell (row-major); without it the token of lowest score, the first on a tie.
    """
    result = []
    for b in range(score.shape[0]):
        chosen = []
        for index, tokens in enumerate(cell_tokens(grid, cell)):
            best = tokens[0] if positions is None else tokens[positions[index]]
            if positions is None:
                for token in tokens:
                    if float(score[b, token]) < float(score[b, best]):
                        best = token
            chosen.append(best)
        result.append(chosen)
    return result


def random_positions(grid: Pair, cell: Pair, seed: int) -> list[int]:
    """ToMe's draw, which a seed defines: the position of the destination in every complete cell."""
    cells, generator = len(cell_tokens(grid, cell)), torch.Generator().manual_seed(seed)
    return torch.randint(cell[0] * cell[1], (cells,), generator=generator).tolist()


def row_positions(score: Tensor, grid: Pair, cell: Pair) -> list[list[int]]:
    """The released code's choice, per sample: the j-th run of a band of rows says where in its j-th cell to look."""
    rows, columns = grid
    size, across = cell[0] * cell[1], columns // cell[1]
    result = []
    for values in score.tolist():
        chosen = []
        for top in range(0, rows - rows % cell[0], cell[0]):
            band = [values[(top + down) * columns + c] for down in range(cell[0]) for c in range(across * cell[1])]
            runs = [band[index * size : (index + 1) * size] for index in range(across)]
            chosen += [run.index(min(run)) for run in runs]
        result.append(chosen)
    return result


def merged_count(grid: Pair, cell: Pair, ratio: float) -> int:
    """The number of sources that merge: ``min(int(N * ratio), number of sources)``."""
    tokens = grid[0] * grid[1]
    return min(int(tokens * ratio), tokens - len(cell_tokens(grid, cell)))


def match(
    metric: Tensor, chosen: Sequence[Sequence[int]], grid: Pair | None = None, window: Pair | None = None
) -> list[list[tuple[int, int, float]]]:
    """For each sample, ``(source, destination, similarity)`` of every source, window by window and in token order.

    The destination is the most similar one of the window by cosine, on a tie that of lowest token index.
    """
    tokens = range(metric.shape[1])
    windows = [list(tokens)] if grid is None or window is None else cell_tokens(grid, window)
    values = _numpy(metric)
    result = []
    for b in range(values.shape[0]):
        unit = []
        for token in range(values.shape[1]):
            norm = np.sqrt(np.sum(values[b, token] * values[b, token], dtype=np.float32))
            unit.append(values[b, token] / max(norm, np.float32(1e-12)))
        matches = []
        for members in windows:
            ordered = sorted(set(chosen[b]) & set(members))
            for source in members:
                if source in ordered:
                    continue
                best, highest = -1, -np.inf
                for destination in ordered:
                    similarity = float(np.dot(unit[source], unit[destination]))
                    if similarity > highest:
                        best, highest = destination, similarity
                matches.append((source, best, highest))
        result.append(matches)
    return result


def window_sides(grid: Pair, cell: Pair, limit: int | None) -> Pair:
    """Rows and columns of the windows: the most cells, up to ``limit`` tokens, that divide an axis; else all of it."""
    sides = []
    for side, step in zip(grid, cell, strict=True):
        longest = side
        for length in range(step, side + 1, step):
            if limit is not None and length <= limit and side % length == 0:
                longest = length
        sides.append(longest)
    return sides[0], sides[1]


def merge_plan(
    metric: Tensor,
    grid: Pair,
    cell: Pair,
    merged: int,
    positions: Sequence[int] | None = None,
    window: Pair | None = None,
) -> Plan:
    """The plan that merges the ``merged`` most similar sources (on a tie the first), metric (B, N, C)."""
    chosen = destinations(laplacian_score(metric, grid), grid, cell, positions)
    assign, rep = [], []
    for matches in match(metric, chosen, grid, window):
        ranked = sorted(matches, key=lambda item: -item[2])
        target = {source: destination for source, destination, _ in ranked[:merged]}
        kept = [token for token in range(metric.shape[1]) if token not in target]
        rep.append(kept)
        assign.append([kept.index(target.get(token, token)) for token in range(metric.shape[1])])
    return Plan(torch.tensor(assign), torch.tensor(rep))


def pool_plan(metric: Tensor, grid: Pair, cell: Pair, pooled: int) -> Plan:
    """The plan that makes one group of each of the ``pooled`` cells whose highest score is lowest, first on a tie."""
    cells = cell_tokens(grid, cell)
    assign, rep = [], []
    for values in laplacian_score(metric, grid).tolist():
        order = sorted(range(len(cells)), key=lambda index: (max(values[token] for token in cells[index]), index))
        target = {token: cells[index][0] for index in order[:pooled] for token in cells[index]}
        kept = [token for token in range(metric.shape[1]) if target.get(token, token) == token]
        rep.append(kept)
        assign.append([kept.index(target.get(token, token)) for token in range(metric.shape[1])])
    return Plan(torch.tensor(assign), torch.tensor(rep))


def one_behind_another(plans: Sequence[Plan]) -> Plan:
    """The plan of a sequence of images, whose tokens and groups come one image behind another."""
    assign: list[list[int]] = [[] for _ in plans[0].assign]
    rep: list[list[int]] = [[] for _ in plans[0].rep]
    tokens = groups = 0
    for plan in plans:
        for b in range(len(assign)):
            assign[b] += [groups + int(group) for group in plan.assign[b]]
            rep[b] += [tokens + int(token) for token in plan.rep[b]]
        tokens, groups = tokens + plan.assign.shape[1], groups + plan.rep.shape[1]
    return Plan(torch.tensor(assign), torch.tensor(rep))


def group_sizes(plan: Plan) -> Tensor:
    """How many tokens each group has, (B, M) float32."""
    rows = [[sum(of == group for of in row) for group in range(plan.rep.shape[1])] for row in plan.assign.tolist()]
    return torch.tensor(rows, dtype=torch.float32)


def blend(y: Tensor, metric: Tensor, plan: Plan) -> Tensor:
    """Every token that merged away gets a mean of the rows of the three groups most similar to it: (B, N, C).

    Similarity is that of the token's metric and the group's mean metric, by cosine; a group counts ``exp(5 * cosine)``.
    """
    means, result = merge(metric.float(), plan), unmerge(y, plan).float()
    for b in range(len(y)):
        for token in set(range(metric.shape[1])) - set(plan.rep[b].tolist()):
            cosines = torch.nn.functional.cosine_similarity(metric[b, token].float()[None], means[b]).tolist()
            best = sorted(range(len(cosines)), key=lambda group: -cosines[group])[:3]
            weights = [float(np.exp(5 * cosines[group])) for group in best]
            rows = [weight * y[b, group].float() for weight, group in zip(weights, best, strict=True)]
            result[b, token] = torch.stack(rows).sum(0) / sum(weights)
    return result.to(y.dtype)


def merge(x: Tensor, plan: Plan) -> Tensor:
    """Equal-weight mean of every group: (B, N, C) -> (B, M, C), computed in float32, returned in x.dtype."""
    values = _numpy(x)
    merged = np.zeros((x.shape[0], plan.rep.shape[1], x.shape[2]), np.float32)
    for b in range(values.shape[0]):
        sizes = [0] * plan.rep.shape[1]
        for token, group in enumerate(plan.assign[b].tolist()):
            merged[b, group] += values[b, token]
            sizes[group] += 1
        for group, size in enumerate(sizes):
            merged[b, group] /= np.float32(size)
    return torch.from_numpy(merged).to(x.dtype)


def unmerge(y: Tensor, plan: Plan) -> Tensor:
    """Every token gets its group's: (B, M, C) -> (B, N, C)."""
    rows = [[y[b, group] for group in plan.assign[b].tolist()] for b in range(y.shape[0])]
    return torch.stack([torch.stack(row) for row in rows])


def blocks(grid: Pair, factor: int) -> list[list[int]]:
    """The tokens of every block of a downsampling, blocks and tokens row-major; the last ones of an axis may be cut."""
    found: dict[Pair, list[int]] = {}
    for token in range(grid[0] * grid[1]):
        row, column = divmod(token, grid[1])
        found.setdefault((row // factor, column // factor), []).append(token)
    return [found[place] for place in sorted(found)]


def nearest_tokens(grid: Pair, factor: int) -> list[int]:
    """Of every block, the token that torch's ``nearest-exact`` takes for it at a scale of ``1 / factor``.

    The edge is repeated until whole blocks are there, since torch rounds the number of blocks down.
    """
    image = torch.arange(float(grid[0] * grid[1])).view(1, 1, *grid)
    image = torch.nn.functional.pad(image, (0, -grid[1] % factor, 0, -grid[0] % factor), mode="replicate")
    small = torch.nn.functional.interpolate(image, scale_factor=1 / factor, mode="nearest-exact")
    return [int(token) for token in small.flatten()]


def kv_downsample(x: Tensor, alpha: float | Sequence[float], grid: Pair, factor: int) -> Tensor:
    """``alpha * nearest + (1 - alpha) * mean`` of every factor x factor block: (B, N, C) -> (B, blocks, C).

    ``alpha`` is one number or one a sample; the mean is over what the block has, the last of an axis what is left.
    """
    values = _numpy(x)
    alphas = [alpha] * x.shape[0] if isinstance(alpha, (int, float)) else list(alpha)
    members, nearest = blocks(grid, factor), nearest_tokens(grid, factor)
    result = np.zeros((x.shape[0], len(members), x.shape[2]), np.float32)
    for b in range(values.shape[0]):
        weight = np.float32(alphas[b])
        for index, tokens in enumerate(members):
            total = np.zeros(x.shape[2], np.float32)
            for token in tokens:
                total += values[b, token]
            mean = total / np.float32(len(tokens))
            result[b, index] = weight * values[b, nearest[index]] + (np.float32(1) - weight) * mean
    return torch.from_numpy(result).to(x.dtype)


def linear_alpha(
    timestep: Tensor | float, batch: int, noisy: float, clean: float, t_noisy: float, t_clean: float
) -> list[float]:
    """One alpha a sample: linear from ``noisy`` at ``t_noisy`` to ``clean`` at ``t_clean``, clamped outside."""
    steps = torch.as_tensor(timestep).float().reshape(-1).tolist()
    steps = steps * batch if len(steps) == 1 else steps
    alphas = []
    for step in steps:
        fraction = (np.float32(step) - np.float32(t_clean)) / (np.float32(t_noisy) - np.float32(t_clean))
        fraction = min(max(fraction, np.float32(0)), np.float32(1))
        alphas.append(float(np.float32(clean) + fraction * (np.float32(noisy) - np.float32(clean))))
    return alphas


def _numpy(x: Tensor) -> Floats:
    return np.asarray(x.detach().to(torch.float32).contiguous().numpy(), dtype=np.float32)
