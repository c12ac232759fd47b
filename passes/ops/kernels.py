"""The parts of a plan and of a merge that have a Triton kernel, as operators, and the switch between them and torch.

No GPU has timed them yet (``bench/README.md`` says what one confirmed), so they are off unless ``BIGAIN_TRITON=1`` is
in the environment. It is read whenever an operator is called or traced. What is in plain torch beside them stays the
reference. Unmerging has no kernel: inductor fuses that gather into the residual sum.

Each operator is opaque to a compiler. They have no derivative; tensors that require one take the way of plain torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from bigain_fx.passes.ops.score import complete_cells

HALF = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float16,)}
"""What is multiplied as it is. Triton's interpreter, which is what runs on a CPU, multiplies the bits of bfloat16."""

_off: ContextVar[bool] = ContextVar("kernels_off", default=False)


def switched_on(device: str) -> bool:
    """Whether the kernels are used on ``device``: "cuda", or "cpu", which takes Triton's interpreter."""
    if _off.get() or os.environ.get("BIGAIN_TRITON") != "1":
        return False
    return device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def take(x: Tensor) -> bool:
    """Whether the kernels are used on ``x``."""
    return switched_on(x.device.type) and not (x.requires_grad and torch.is_grad_enabled())


@contextmanager
def without_kernels() -> Iterator[None]:
    """Call and trace in plain torch meanwhile, for what will run where these operators are not."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def nearest(
    sources: Tensor, destinations: Tensor, source_norm: Tensor, destination_norm: Tensor
) -> tuple[Tensor, Tensor]:
    """The destination of largest cosine similarity of each source; the matrix of similarities is never written.

    Products of float16 and bfloat16 are exact in float32, so that the rows are multiplied as they are, and divided by
    their norms (at least 1e-12) afterwards. Others are multiplied in float32.

    Args:
        sources: ``(B, S, C)`` floating, any strides.
        destinations: ``(B, D, C)`` of the same dtype, ``D`` at least 1.
        source_norm, destination_norm: ``(B, S)`` and ``(B, D)`` float32; ones for rows that are of unit length.

    Returns:
        ``(B, S)`` float32 and ``(B, S)`` int64 into ``[0, D)``, the lowest on a tie.
    """
    from bigain_fx.passes.ops import triton_kernels

    half = sources.dtype in HALF[sources.device.type]
    if not half:
        sources, destinations = sources.float(), destinations.float()
    similarity, index = _nearest_like(sources, destinations, source_norm, destination_norm)
    (batch, count, channels), block = sources.shape, 64
    triton_kernels.nearest[-(-count // block), batch](
        sources, destinations, source_norm.contiguous(), destination_norm.contiguous(), similarity, index,
        count, destinations.shape[1], channels, *sources.stride(), *destinations.stride(),
        block_s=block, block_d=block, block_c=64 if half else 32, num_warps=4 if half else 8,
    )  # fmt: skip
    return similarity, index


def score_and_elect(metric: Tensor, grid: Sequence[int], cell: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Each cell's token of lowest Laplacian score, and each token's norm, from one look at the metric.

    Args:
        metric: ``(B, N, C)`` floating, any strides; computed in float32.
        grid: ``(h, w)`` with ``h * w == N``.
        cell: ``(rows, columns)``.

    Returns:
        ``(B, cells)`` int64, the offset within each complete cell, the first on a tie; and ``(B, N)`` float32.
    """
    from bigain_fx.passes.ops import triton_kernels

    position, norm = _score_and_elect_like(metric, grid, cell)
    (height, width), (rows, columns) = grid, cell
    members = 1 << (rows * columns - 1).bit_length()
    cells = -(-height // rows) * -(-width // columns)
    triton_kernels.score_and_elect[cells, len(metric)](
        metric, position, norm, height, width, metric.shape[2], *metric.stride(),
        cell_rows=rows, cell_columns=columns, members=members, block_c=max(32, 1024 // members),
    )  # fmt: skip
    return position, norm


def segment_mean(x: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Mean of each group of tokens, given the tokens in the order of their groups; the same at every run.

    Args:
        x: ``(B, N, C)`` floating, any strides; averaged in float32.
        order: ``(B * N,)`` int64, rows of the flattened batch, group by group.
        starts: ``(B * M,)`` int64, where in ``order`` each group begins.

    Returns:
        ``(B, M, C)`` in ``x``'s dtype.
    """
    from bigain_fx.passes.ops import triton_kernels

    mean = _segment_mean_like(x, order, starts)
    (_, tokens, channels), block = x.shape, 128
    triton_kernels.segment_mean[len(starts), -(-channels // block)](
        x, order, starts, mean, len(order), len(starts), tokens, channels, *x.stride(), block_n=16, block_c=block
    )
    return mean


def _nearest_like(sources: Tensor, destinations: Tensor, *norms: Tensor) -> tuple[Tensor, Tensor]:
    shape = sources.shape[:2]
    return sources.new_empty(shape, dtype=torch.float32), sources.new_empty(shape, dtype=torch.int64)


def _score_and_elect_like(metric: Tensor, grid: Sequence[int], cell: Sequence[int]) -> tuple[Tensor, Tensor]:
    down, across = complete_cells(grid, cell)
    position = metric.new_empty(len(metric), down * across, dtype=torch.int64)
    return position, metric.new_empty(metric.shape[:2], dtype=torch.float32)


def _segment_mean_like(x: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return x.new_empty(len(x), len(starts) // len(x), x.shape[2])


SCHEMAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "nearest(Tensor sources, Tensor destinations, Tensor source_norm, Tensor destination_norm)"
    " -> (Tensor similarity, Tensor index)": (nearest, _nearest_like),
    "score_and_elect(Tensor metric, int[2] grid, int[2] cell) -> (Tensor position, Tensor norm)":
        (score_and_elect, _score_and_elect_like),
    "segment_mean(Tensor x, Tensor order, Tensor starts) -> Tensor": (segment_mean, _segment_mean_like),
}  # fmt: skip


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the tensors'."""

    def launch(x: Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return kernel(x, *args)

    return launch


for _schema, (_kernel, _like) in SCHEMAS.items():
    _name, _, _signature = _schema.partition("(")
    # Any layout will do: the kernels take strides, so that a compiler need not copy a permuted metric.
    _tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
    torch.library.define(f"bigain::{_name}", f"({_signature}", tags=_tags)
    torch.library.impl(f"bigain::{_name}", ("cpu", "cuda"), _on_its_device(_kernel))
    torch.library.register_fake(f"bigain::{_name}", _like)
