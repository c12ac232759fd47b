"""The kernels in Triton; :mod:`bigain_fx.passes.ops.kernels` says what each computes, and launches it.

This is the only module that imports Triton, and it is imported when a kernel is first launched.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(
    sources, destinations, source_norm, destination_norm, similarity, index, n_sources, n_destinations, channels,
    source_batch, source_row, source_channel, destination_batch, destination_row, destination_channel,
    block_s: tl.constexpr, block_d: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """A matrix product in tiles, of which each row keeps its maximum so far: one program a block of sources."""
    batch = tl.program_id(1).to(tl.int64)
    source = tl.program_id(0) * block_s + tl.arange(0, block_s)
    is_source = source < n_sources
    source_at = sources + batch * source_batch + source.to(tl.int64) * source_row
    best = tl.full([block_s], float("-inf"), tl.float32)
    best_at = tl.zeros([block_s], tl.int32)
    for first in range(0, n_destinations, block_d):
        destination = first + tl.arange(0, block_d)
        is_destination = destination < n_destinations
        destination_at = destinations + batch * destination_batch + destination.to(tl.int64) * destination_row
        product = tl.zeros([block_s, block_d], tl.float32)
        for start in range(0, channels, block_c):
            channel = start + tl.arange(0, block_c)
            is_channel = channel < channels
            left = tl.load(
                source_at[:, None] + channel[None, :] * source_channel,
                mask=is_source[:, None] & is_channel[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                destination_at[None, :] + channel[:, None] * destination_channel,
                mask=is_destination[None, :] & is_channel[:, None], other=0.0,
            )  # fmt: skip
            product = tl.dot(left, right, product, input_precision="ieee")
        norm = tl.load(destination_norm + batch * n_destinations + destination, mask=is_destination, other=1.0)
        product = product * (1.0 / tl.maximum(norm, 1e-12))[None, :]
        # A NaN is equal to nothing, itself included: it is never the best, and the index stays in range.
        product = tl.where(is_destination[None, :] & (product == product), product, float("-inf"))
        highest, at = tl.max(product, 1, return_indices=True)
        # Strictly better, or the earlier block keeps it: the lowest index on a tie.
        better = highest > best
        best = tl.where(better, highest, best)
        best_at = tl.where(better, first + at, best_at)
    norm = tl.load(source_norm + batch * n_sources + source, mask=is_source, other=1.0)
    tl.store(similarity + batch * n_sources + source, best / tl.maximum(norm, 1e-12), mask=is_source)
    tl.store(index + batch * n_sources + source, best_at.to(tl.int64), mask=is_source)


@triton.jit
def score_and_elect(
    metric, position, norm, height, width, channels, metric_batch, metric_row, metric_channel,
    cell_rows: tl.constexpr, cell_columns: tl.constexpr, members: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One program a cell, the incomplete ones at the right and at the bottom included: their tokens have norms too."""
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(width, cell_columns)
    down = tl.program_id(0) // across
    right = tl.program_id(0) % across
    member = tl.arange(0, members)  # a power of two, at least the size of the cell
    row = down * cell_rows + member // cell_columns
    column = right * cell_columns + member % cell_columns
    is_token = (member < cell_rows * cell_columns) & (row < height) & (column < width)
    token = row * width + column
    token_at = metric + batch * metric_batch + token.to(tl.int64) * metric_row
    line = width * metric_row
    score = tl.zeros([members], tl.float32)
    squares = tl.zeros([members], tl.float32)
    for start in range(0, channels, block_c):
        channel = start + tl.arange(0, block_c)
        is_channel = (channel < channels)[None, :]
        at = token_at[:, None] + channel[None, :] * metric_channel
        has_above = (is_token & (row > 0))[:, None] & is_channel
        has_below = (is_token & (row < height - 1))[:, None] & is_channel
        has_left = (is_token & (column > 0))[:, None] & is_channel
        has_right = (is_token & (column < width - 1))[:, None] & is_channel
        here = tl.load(at, mask=is_token[:, None] & is_channel, other=0.0).to(tl.float32)
        around = tl.load(at - line, mask=has_above, other=0.0).to(tl.float32)
        around += tl.load(at + line, mask=has_below, other=0.0).to(tl.float32)
        around += tl.load(at - metric_row, mask=has_left, other=0.0).to(tl.float32)
        around += tl.load(at + metric_row, mask=has_right, other=0.0).to(tl.float32)
        score += tl.sum(tl.abs(around - 4.0 * here), 1)
        squares += tl.sum(here * here, 1)
    tl.store(norm + batch * height * width + token, tl.sqrt_rn(squares), mask=is_token)
    complete_down = height // cell_rows
    complete_across = width // cell_columns
    is_complete = (down < complete_down) & (right < complete_across)
    score = tl.where((member < cell_rows * cell_columns) & (score == score), score, float("inf"))  # no NaN either
    lowest = tl.argmin(score, 0)  # the first on a tie
    cell = batch * complete_down * complete_across + down * complete_across + right
    tl.store(position + cell, lowest.to(tl.int64), mask=is_complete)


@triton.jit
def segment_mean(
    x, order, starts, mean, rows, groups, tokens, channels, x_batch, x_row, x_channel,
    block_n: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One program a group and block of channels adds the group's members in their order: no atomics."""
    group = tl.program_id(0)
    channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
    is_channel = channel < channels
    first = tl.load(starts + group).to(tl.int32)
    end = tl.load(starts + group + 1, mask=group + 1 < groups, other=rows).to(tl.int32)
    total = tl.zeros([block_c], tl.float32)
    for start in range(first, end, block_n):
        place = start + tl.arange(0, block_n)
        is_member = place < end
        row = tl.load(order + place, mask=is_member, other=0)
        at = x + (row // tokens) * x_batch + (row % tokens) * x_row
        values = tl.load(
            at[:, None] + channel[None, :] * x_channel, mask=is_member[:, None] & is_channel[None, :], other=0.0
        )
        total += tl.sum(values.to(tl.float32), 0)
    total = total / tl.maximum(end - first, 1).to(tl.float32)
    mean_at = mean + group.to(tl.int64) * channels + channel
    tl.store(mean_at, total.to(mean.dtype.element_ty), mask=is_channel)
