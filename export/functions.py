"""The operators as ONNX functions: domain ``bigain``, bodies in standard operators, valid from opset 18 on.

What they compute is in ``docs/operators.md``. Three rules shaped the bodies:

- The plan is an island of float32: the CUDA provider has no bfloat16 ArgMin, ArgMax or Pad, nor TopK below opset 24.
- Whatever depends on the attributes alone (cell members, offsets) is folded by the runtime when it loads the graph.
- No scattering reduction: which types it takes differs from release to release, TensorRT has none, and ONNX has no
  mean. Merging is a sort and prefix sums instead, unmerging one gather.
"""
# What onnxscript compiles is ONNX in Python's syntax; torch's types say nothing about it.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import script
from onnxscript.onnx_opset import opset18 as op
from onnxscript.values import OnnxFunction, Opset

DOMAIN, VERSION = "bigain", 1
_bigain = Opset(DOMAIN, VERSION)
_FLOAT = 1
_EPSILON = 1e-12


@script(_bigain, default_opset=op)
def Rows(tokens, index):
    """Tokens by index: ``tokens (B, N, C)``, ``index (B, K)`` int64 -> ``(B, K, C)``, one gather of whole rows."""
    batch, count, _ = op.Split(op.Shape(tokens), num_outputs=3)
    first = op.Mul(op.Range(0, op.Squeeze(batch), 1), count)
    rows = op.Reshape(tokens, op.Concat([-1], op.Shape(tokens, start=2), axis=0))
    return op.Gather(rows, op.Add(index, op.Unsqueeze(first, [1])), axis=0)


@script(_bigain, default_opset=op)
def CellTokens(grid: Sequence[int], cell: Sequence[int]):
    """Token index of every member of every complete cell: ``(cells, rows * columns)`` int64, both row-major."""
    sides, cells = op.Identity(grid), op.Identity(cell)
    complete = op.Div(sides, cells)
    index = op.Reshape(op.Range(0, op.ReduceProd(sides, keepdims=0), 1), sides)
    index = op.Slice(index, [0, 0], op.Mul(complete, cells), [0, 1])
    down, across = op.Split(complete, num_outputs=2)
    rows, columns = op.Split(cells, num_outputs=2)
    index = op.Transpose(op.Reshape(index, op.Concat(down, rows, across, columns, axis=0)), perm=[0, 2, 1, 3])
    return op.Reshape(index, op.Concat(op.Mul(down, across), op.Mul(rows, columns), axis=0))


@script(_bigain, default_opset=op)
def LaplacianPosition(metric, grid: Sequence[int], cell: Sequence[int]):
    """Offset of the token of lowest Laplacian score in each complete cell: ``(B, cells)`` int64, first on a tie."""
    sides = op.Identity(grid)
    tokens = op.Reshape(op.Cast(metric, to=_FLOAT), op.Concat([0], sides, [-1], axis=0))
    padded = op.Pad(tokens, [0, 1, 1, 0, 0, 1, 1, 0])
    up = op.Slice(padded, [0, 1], [-2, -1], [1, 2])
    below = op.Slice(padded, [2, 1], op.Add(sides, [2, 1]), [1, 2])
    left = op.Slice(padded, [1, 0], [-1, -2], [1, 2])
    right = op.Slice(padded, [1, 2], op.Add(sides, [1, 2]), [1, 2])
    laplacian = op.Sub(op.Add(op.Add(op.Add(up, below), left), right), op.Mul(tokens, 4.0))
    score = op.Reshape(op.ReduceSum(op.Abs(laplacian), [3], keepdims=0), [0, -1])
    return op.ArgMin(op.Gather(score, CellTokens(grid=grid, cell=cell), axis=1), axis=2, keepdims=0)


@script(_bigain, default_opset=op)
def MergePlan(metric, position, grid: Sequence[int], cell: Sequence[int], window: Sequence[int], merged: int):
    """The plan for destinations at ``position (1 | B, cells)``: ``assign (B, N)``, ``rep (B, N - merged)`` int64."""
    tokens = op.ReduceProd(grid)
    members = CellTokens(grid=grid, cell=cell)
    windows = CellTokens(grid=grid, cell=window)
    destinations, count = op.Shape(members, start=0, end=1), op.Shape(windows, start=0, end=1)
    length, each = op.Shape(windows, start=1), op.Div(destinations, count)
    sources = op.Sub(tokens, destinations)
    kept = op.Unsqueeze(merged, [0])
    batch = op.Shape(metric, start=0, end=1)

    # The sources of each window, then its destinations: sort the token index with the destinations lifted above it.
    elected = op.GatherElements(members, op.Transpose(position, perm=[1, 0]), axis=1)
    elected = op.Expand(op.Transpose(elected, perm=[1, 0]), op.Concat(batch, destinations, axis=0))
    index = op.Expand(op.Range(0, op.Squeeze(tokens), 1), op.Concat(batch, tokens, axis=0))
    lifted = op.ScatterElements(index, elected, op.Add(elected, tokens), axis=1)
    order, _ = op.TopK(op.Gather(lifted, windows, axis=1), length, axis=2, largest=0, sorted=1)
    source = op.Reshape(op.Slice(order, [0], op.Sub(length, each), [2]), [0, -1])
    destination = op.Sub(op.Reshape(op.Slice(order, op.Sub(length, each), length, [2]), [0, -1]), tokens)

    values = op.Cast(metric, to=_FLOAT)
    unit = op.Div(values, op.Max(op.ReduceL2(values, [2], keepdims=1), _EPSILON))
    apart = op.Concat(op.Mul(batch, count), [-1], op.Shape(metric, start=2), axis=0)
    theirs = op.Transpose(op.Reshape(Rows(unit, destination), apart), perm=[0, 2, 1])
    similarity = op.MatMul(op.Reshape(Rows(unit, source), apart), theirs)
    match = op.ArgMax(similarity, axis=2, keepdims=0)
    match = op.Reshape(match, op.Concat(batch, count, [-1], axis=0))
    first = op.Mul(op.Range(0, op.Squeeze(count), 1), each)
    match = op.Reshape(op.Add(match, op.Unsqueeze(first, [1])), [0, -1])
    best = op.Reshape(op.ReduceMax(similarity, [2], keepdims=0), op.Concat(batch, [-1], axis=0))
    _, ranked = op.TopK(best, sources, axis=1, largest=1, sorted=1)
    folded = op.Slice(ranked, [0], kept, [1])
    alone = op.Slice(ranked, kept, sources, [1])

    rep = op.Concat(destination, op.GatherElements(source, alone, axis=1), axis=1)
    group = op.Expand(op.Range(0, op.Squeeze(op.Sub(tokens, kept)), 1), op.Shape(rep))
    where = op.Concat(rep, op.GatherElements(source, folded, axis=1), axis=1)
    group = op.Concat(group, op.GatherElements(match, folded, axis=1), axis=1)
    assign = op.ScatterElements(index, where, group, axis=1)
    return assign, rep


@script(_bigain, default_opset=op)
def LaplacianMergePlan(metric, grid: Sequence[int], cell: Sequence[int], window: Sequence[int], merged: int):
    """The plan of BiGain-TM: ``metric (B, N, C)`` floating -> ``assign (B, N)``, ``rep (B, N - merged)`` int64."""
    position = LaplacianPosition(metric, grid=grid, cell=cell)
    assign, rep = MergePlan(metric, position, grid=grid, cell=cell, window=window, merged=merged)
    return assign, rep


@script(_bigain, default_opset=op)
def Groups(assign, groups: int):
    """Tokens sorted by group ``(B, N)``, and where each group starts and ends among them, ``(B, groups)``, int64."""
    tokens = op.Shape(assign, start=1)
    count = op.Unsqueeze(groups, [0])
    index = op.Range(0, op.Squeeze(tokens), 1)
    keys, _ = op.TopK(op.Add(op.Mul(assign, tokens), index), tokens, axis=1, largest=0, sorted=1)
    group = op.Div(keys, tokens)
    order = op.Sub(keys, op.Mul(group, tokens))
    previous = op.Concat(op.Sub(op.Slice(group, [0], [1], [1]), 1), op.Slice(group, [0], [-1], [1]), axis=1)
    continues = op.Equal(group, previous)
    starts, _ = op.TopK(op.Where(continues, op.Add(index, tokens), index), count, axis=1, largest=0, sorted=1)
    end = op.Expand(tokens, op.Concat(op.Shape(assign, end=1), [1], axis=0))
    ends = op.Concat(op.Slice(starts, [1], count, [1]), end, axis=1)
    return order, starts, ends


@script(_bigain, default_opset=op)
def GroupSizes(assign, groups: int):
    """How many tokens each group has: ``assign (B, N)`` int64 -> ``(B, groups)`` float32."""
    _, starts, ends = Groups(assign, groups=groups)
    return op.Cast(op.Sub(ends, starts), to=_FLOAT)


@script(_bigain, default_opset=op)
def Merge(x, assign, groups: int, block: int):
    """Mean of each group: ``x (B, N, C)``, ``assign (B, N)`` int64 -> ``(B, groups, C)`` in ``x``'s dtype.

    Tokens sorted by group are summed by prefix sums within blocks of ``block`` tokens and over whole blocks. The sum of
    blocks serves only groups of more than ``block`` tokens, so that no small group is a difference of large numbers.
    """
    tokens = op.Shape(assign, start=1)
    size = op.Unsqueeze(block, [0])
    blocks = op.Div(tokens, size)
    order, starts, ends = Groups(assign, groups=groups)
    last = op.Sub(ends, 1)

    ordered = Rows(op.Cast(x, to=_FLOAT), order)
    split = op.Reshape(ordered, op.Concat([0], blocks, size, [-1], axis=0))
    within = op.CumSum(split, 2)
    whole = op.Squeeze(op.Slice(within, [-1], size, [2]), [2])
    before = op.CumSum(whole, 1, exclusive=1)
    within = op.Reshape(within, op.Concat([0], tokens, [-1], axis=0))

    first_block, last_block = op.Div(starts, size), op.Div(last, size)
    next_block = op.Min(op.Add(first_block, 1), last_block)
    crosses = op.Unsqueeze(op.Cast(op.Less(first_block, last_block), to=_FLOAT), [2])
    head = op.Add(op.Sub(op.Mul(Rows(whole, first_block), crosses), Rows(within, starts)), Rows(ordered, starts))
    middle = op.Sub(Rows(before, last_block), Rows(before, next_block))
    total = op.Add(op.Add(head, middle), Rows(within, last))
    mean = op.Div(total, op.Unsqueeze(op.Cast(op.Sub(ends, starts), to=_FLOAT), [2]))
    return op.CastLike(mean, x)


@script(_bigain, default_opset=op)
def Unmerge(y, assign):
    """Each token's group: ``y (B, M, C)``, ``assign (B, N)`` int64 -> ``(B, N, C)``, dtype kept."""
    return Rows(y, assign)


@script(_bigain, default_opset=op)
def NearestGroups(metric, assign, rep, groups: int, block: int, count: int, sharpness: float):
    """The ``count`` groups that a folded token resembles most: ``near (B, count, N)``, ``weight (B, count - 1, N)``."""
    tokens = op.Shape(assign, start=1)
    index = op.Expand(op.Range(0, op.Squeeze(tokens), 1), op.Shape(assign))
    lifted = op.ScatterElements(index, rep, op.Add(rep, tokens), axis=1)
    folded, _ = op.TopK(lifted, op.Sub(tokens, op.Unsqueeze(groups, [0])), axis=1, largest=0, sorted=1)

    values = op.Cast(metric, to=_FLOAT)
    mine, means = Rows(values, folded), Merge(values, assign, groups=groups, block=block)
    mine = op.Div(mine, op.Max(op.ReduceL2(mine, [2], keepdims=1), _EPSILON))
    means = op.Div(means, op.Max(op.ReduceL2(means, [2], keepdims=1), _EPSILON))
    taken = op.Unsqueeze(count, [0])
    highest, nearest = op.TopK(op.MatMul(mine, op.Transpose(means, perm=[0, 2, 1])), taken, axis=2, largest=1, sorted=1)
    shares = op.Softmax(op.Mul(highest, sharpness), axis=2)
    shares = op.Transpose(op.Slice(shares, [1], taken, [2]), perm=[0, 2, 1])
    nearest = op.Transpose(nearest, perm=[0, 2, 1])

    batch = op.Shape(assign, end=1)
    near = op.Expand(op.Unsqueeze(assign, [1]), op.Concat(batch, taken, tokens, axis=0))
    where = op.Unsqueeze(folded, [1])
    near = op.ScatterElements(near, op.Expand(where, op.Shape(nearest)), nearest, axis=2)
    weight = op.Expand(0.0, op.Concat(batch, op.Sub(taken, 1), tokens, axis=0))
    weight = op.ScatterElements(weight, op.Expand(where, op.Shape(shares)), shares, axis=2)
    return near, weight


@script(_bigain, default_opset=op)
def Blend(y, near, weight):
    """A mean of several groups: ``y (B, M, C)``, ``near (B, k, N)``, ``weight (B, k - 1, N)`` -> ``(B, N, C)``."""
    flat = op.Reshape(near, [0, -1])
    rows = op.Reshape(Rows(op.Cast(y, to=_FLOAT), flat), op.Concat(op.Shape(near), [-1], axis=0))
    shares = op.Concat(op.Sub(1.0, op.ReduceSum(weight, [1], keepdims=1)), weight, axis=1)
    return op.CastLike(op.ReduceSum(op.Mul(rows, op.Unsqueeze(shares, [3])), [1], keepdims=0), y)


@script(_bigain, default_opset=op)
def KVDownsample(x, alpha, grid: Sequence[int], factor: int):
    """``alpha * nearest + (1 - alpha) * mean`` of each block: ``x (B, N, C)``, ``alpha ()`` or ``(B,)`` float32."""
    side = op.Unsqueeze(factor, [0])
    down, across = op.Split(op.Div(grid, side), num_outputs=2)
    blocks = op.Reshape(op.Cast(x, to=_FLOAT), op.Concat([0], down, side, across, side, [-1], axis=0))
    middle = op.Div(side, 2)
    nearest = op.Gather(op.Gather(blocks, op.Squeeze(middle), axis=4), op.Squeeze(middle), axis=2)
    weight = op.Reshape(alpha, [-1, 1, 1, 1])
    mixed = op.Add(op.Mul(weight, nearest), op.Mul(op.Sub(1.0, weight), op.ReduceMean(blocks, [2, 4], keepdims=0)))
    return op.CastLike(op.Reshape(mixed, op.Concat([0], op.Mul(down, across), [-1], axis=0)), x)


@script(_bigain, default_opset=op)
def KVDownsampleCut(x, alpha, grid: Sequence[int], factor: int):
    """As ``KVDownsample``, on a grid whose last row or column of blocks is cut off at the edge."""
    sides, side = op.Identity(grid), op.Unsqueeze(factor, [0])
    blocks = op.Div(op.Add(sides, op.Sub(side, 1)), side)
    down, across = op.Split(blocks, num_outputs=2)
    h, w = op.Split(sides, num_outputs=2)
    top, left = op.Range(0, op.Squeeze(h), factor), op.Range(0, op.Squeeze(w), factor)

    image = op.Reshape(op.Cast(x, to=_FLOAT), op.Concat([0], sides, [-1], axis=0))
    missing = op.Sub(op.Mul(blocks, side), sides)
    padded = op.Pad(image, op.Concat([0, 0, 0, 0, 0], missing, [0], axis=0))
    total = op.ReduceSum(op.Reshape(padded, op.Concat([0], down, side, across, side, [-1], axis=0)), [2, 4], keepdims=0)
    members = op.Mul(op.Unsqueeze(op.Min(op.Sub(h, top), side), [1]), op.Min(op.Sub(w, left), side))
    mean = op.Div(total, op.Unsqueeze(op.Cast(members, to=_FLOAT), [2]))

    middle = op.Div(side, 2)
    rows, columns = op.Min(op.Add(top, middle), op.Sub(h, 1)), op.Min(op.Add(left, middle), op.Sub(w, 1))
    nearest = op.Gather(op.Gather(image, rows, axis=1), columns, axis=2)
    weight = op.Reshape(alpha, [-1, 1, 1, 1])
    mixed = op.Add(op.Mul(weight, nearest), op.Mul(op.Sub(1.0, weight), mean))
    return op.CastLike(op.Reshape(mixed, op.Concat([0], op.Mul(down, across), [-1], axis=0)), x)


@script(_bigain, default_opset=op)
def LinearAlpha(timestep, noisy: float, clean: float, t_noisy: float, t_clean: float, batch: int):
    """Alpha linear in the timestep, clamped outside: ``(), (1,)`` or ``(B,)`` floating -> ``(B,)`` float32."""
    progress = op.Div(op.Sub(op.Cast(timestep, to=_FLOAT), t_noisy), op.Sub(t_clean, t_noisy))
    alpha = op.Add(noisy, op.Mul(op.Sub(clean, noisy), op.Clip(progress, 0.0, 1.0)))
    return op.Expand(alpha, op.Unsqueeze(batch, [0]))


FUNCTIONS: tuple[OnnxFunction, ...] = (
    Rows, CellTokens, LaplacianPosition, MergePlan, LaplacianMergePlan, Groups, GroupSizes, Merge, Unmerge,
    NearestGroups, Blend, KVDownsample, KVDownsampleCut, LinearAlpha,
)  # fmt: skip
"""Every function, those that others call included, callees first."""
