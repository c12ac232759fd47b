"""Fewer keys and values: interpolate-extrapolate downsampling, and the schedule of its alpha."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kv_downsample(x: Tensor, alpha: float | Tensor, grid: Sequence[int], factor: int) -> Tensor:
    """``alpha * nearest + (1 - alpha) * block mean`` of each block of tokens (``docs/operators.md``, "Downsampling").

    Args:
        x: ``(B, N, C)`` floating; computed in float32.
        alpha: 0 is average pooling, 1 is nearest, above 1 extrapolates; a number, or ``(B,)`` float32.
        grid: ``(h, w)`` with ``h * w == N``.
        factor: block side ``s``; the last block of an axis has what is left. The token at offset ``s // 2`` in both
            axes is the nearest, the last one of an axis where the block has no such offset.

    Returns:
        ``(B, ceil(h / s) * ceil(w / s), C)`` in ``x``'s dtype.
    """
    (h, w), s = grid, factor
    if h % s or w % s:
        nearest, mean = _of_cut_blocks(x.float().reshape(x.shape[0], h, w, x.shape[-1]), s)
    else:
        blocks = x.float().reshape(x.shape[0], h // s, s, w // s, s, x.shape[-1])
        nearest, mean = blocks[:, :, s // 2, :, s // 2], blocks.mean(dim=(2, 4))
    if isinstance(alpha, Tensor):
        alpha = alpha.view(-1, 1, 1, 1)
    return (alpha * nearest + (1 - alpha) * mean).flatten(1, 2).to(x.dtype)


def downsampled_grid(grid: Sequence[int], factor: int) -> tuple[int, int]:
    """Rows and columns of blocks, those cut off at the edge included.

    >>> downsampled_grid((135, 240), 2)
    (68, 120)
    """
    return -(-grid[0] // factor), -(-grid[1] // factor)


def nearest_tokens(grid: Sequence[int], factor: int) -> Tensor:
    """Index of the nearest token of each block: ``(ceil(h / s) * ceil(w / s),)`` int64 on the CPU, both row-major."""
    rows, columns = (_nearest(torch.arange(0, side, factor), side, factor) for side in grid)
    return (rows[:, None] * grid[1] + columns).flatten()


def _nearest(first: Tensor, side: int, factor: int) -> Tensor:
    """Position of the nearest of each block along an axis of ``side`` tokens, from that of its first."""
    return (first + factor // 2).clamp(max=side - 1)


def _of_cut_blocks(image: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """The nearest and the mean of each block of ``image (B, h, w, C)``, where the last ones are cut off at the edge."""
    (batch, h, w, channels), (down, across) = image.shape, downsampled_grid(image.shape[1:3], s)
    top, left = (torch.arange(0, side, s, device=image.device) for side in (h, w))
    padded = F.pad(image, (0, 0, 0, across * s - w, 0, down * s - h))
    total = padded.reshape(batch, down, s, across, s, channels).sum(dim=(2, 4))
    members = (h - top).clamp(max=s)[:, None] * (w - left).clamp(max=s)
    nearest = image[:, _nearest(top, h, s)[:, None], _nearest(left, w, s)]
    return nearest, total / members[..., None]


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
