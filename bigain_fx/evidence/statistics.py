"""What a difference in accuracy is worth: paired intervals and a paired test."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DRAWS = 10_000


def bootstrap(values: Tensor, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of ``values (n,)``, by resampling them; pass differences for a paired one.

    Returns:
        ``(low, high)``, in the units of ``values``.
    """
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    means = values.double()[picked].mean(1)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Exact two-sided p-value that ``first (n,)`` and ``second (n,)`` bool are right equally often (McNemar 1947).

    Where only one of them is right, a fair coin would decide which.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, float(sum(math.comb(n, k) for k in range(fewer + 1)) / 2 ** (n - 1)))
