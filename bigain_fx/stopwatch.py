"""Timing calls side by side, so that what disturbs the machine for a while disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch


def interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, wait: Callable[[], None] = lambda: None
) -> list[tuple[float, ...]]:
    """Seconds of each call in each round; they take turns, first one and then another, after a round to warm up.

    Args:
        calls: what to time.
        rounds: how often each.
        wait: for the device, before the clock is read.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for index in range(-1, rounds):
        for place in range(len(calls)):
            chosen = (place + index) % len(calls)
            wait()
            started = time.perf_counter()
            calls[chosen]()
            wait()
            if index >= 0:
                seconds[chosen].append(time.perf_counter() - started)
    return [tuple(found) for found in seconds]


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until ``device`` has done its work."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
