"""Fewer keys and values: interpolate-extrapolate downsampling, and the schedule of its alpha."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kv_downsample(x: Tensor, alpha: float | Tensor, grid: Sequence[int], factor: int) -> Tensor:
    """``alpha * nearest + (1 - alpha) * block mean`` of each block of tokens (``docs/operators.md``, "Downsampling").

    Args:
        x: ``(B, N, C)`` floating; computed in float32.
        alpha: 0 is average pooling, 1 is nearest, above 1 extrapolates; a number, or ``(B,)`` float32.
        grid: ``(h, w)`` with ``h * w == N``, both divisible by ``factor``.
        factor: block side ``s``; the token at offset ``s // 2`` in both axes is the nearest.

    Returns:
        ``(B, N / s**2, C)`` in ``x``'s dtype.
    """
    (h, w), s = grid, factor
    blocks = x.float().reshape(x.shape[0], h // s, s, w // s, s, x.shape[-1])
    if isinstance(alpha, Tensor):
        alpha = alpha.view(-1, 1, 1, 1)
    nearest, mean = blocks[:, :, s // 2, :, s // 2], blocks.mean(dim=(2, 4))
    return (alpha * nearest + (1 - alpha) * mean).flatten(1, 2).to(x.dtype)


def nearest_tokens(grid: Sequence[int], factor: int) -> Tensor:
    """Index of the nearest token of each block: ``(N / factor**2,)`` int64 on the CPU, both row-major."""
    index = torch.arange(grid[0] * grid[1]).view(*grid)
    return index[factor // 2 :: factor, factor // 2 :: factor].flatten()


def linear_alpha(timestep: Tensor, batch: int, noisy: float, clean: float, t_noisy: float, t_clean: float) -> Tensor:
    """Alpha linear in the timestep, clamped outside (``docs/operators.md``, "Schedule").

    Args:
        timestep: ``()``, ``(1,)`` or ``(B,)``, any integer or floating dtype, in the model's own units.
        batch: ``B``.
        noisy, clean: alpha at ``t_noisy`` and at ``t_clean``.
        t_noisy, t_clean: the two ends, in the same units as ``timestep``; they differ.

    Returns:
        ``(B,)`` float32, one alpha a sample.
    """
    progress = ((timestep.float() - t_noisy) / (t_clean - t_noisy)).clamp(0, 1)
    return (noisy + (clean - noisy) * progress).expand(batch)
