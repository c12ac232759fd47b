"""Measuring calls: interleaved times, ratios with intervals, deviation, memory, and whether an output is finite."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.utils import _pytree as pytree

from bigain_fx.bench import BenchError

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A median and the ends of its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int,
    *,
    check: Callable[[str, Any], None],
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, tuple[float, ...]]:
    """Call everything in turn, A B C A B C ..., ``warmup`` rounds untimed and then ``rounds`` timed ones.

    Args:
        calls: what to time, by name.
        check: called with the name and each output, outside of the timed part; raises where an output is wrong.
        synchronize: waits for the device, before the clock is read.
        clock: seconds, monotonic.
        tick: called after each call.

    Returns:
        Seconds by name, in the order of the rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmup, rounds):
        for name, call in calls.items():
            synchronize()
            start = clock()
            output = call()
            synchronize()
            elapsed = clock() - start
            check(name, output)
            del output  # one output alive at a time
            if turn >= 0:
                seconds[name].append(elapsed)
            tick()
    return {name: tuple(values) for name, values in seconds.items()}


def speedup(base: Sequence[float], row: Sequence[float], seed: int) -> Estimate:
    """How many times faster ``row`` is than ``base``, paired within rounds, with a seeded bootstrap interval."""
    return _estimate([base, row], lambda rounds: statistics.median(before / after for before, after in rounds), seed)


def efficiency(base: Sequence[float], row: Sequence[float], bound: Sequence[float], seed: int) -> Estimate:
    """The share of what ``bound`` saves of the time of ``base`` that ``row`` saves, likewise."""

    def share(rounds: Sequence[Sequence[float]]) -> float:
        saved = 1 - statistics.median(after / before for before, after, _ in rounds)
        most = 1 - statistics.median(least / before for before, _, least in rounds)
        return saved / most if most > 0 else 0.0

    return _estimate([base, row, bound], share, seed)


def _estimate(
    seconds: Sequence[Sequence[float]], statistic: Callable[[Sequence[tuple[float, ...]]], float], seed: int
) -> Estimate:
    """``statistic`` of the rounds, and its 95 % interval when they are drawn again."""
    rounds = list(zip(*seconds, strict=True))
    generator = random.Random(seed)
    drawn = sorted(statistic(generator.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    tail = round(0.025 * RESAMPLES)
    return Estimate(statistic(rounds), drawn[tail], drawn[-1 - tail])


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output of any structure."""
    leaves = pytree.tree_leaves(output)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_finite(name: str, output: Any) -> None:
    """Refuse an output with a nan or an infinity.

    Raises:
        BenchError: there is one, or no floating-point tensor at all.
    """
    tensors = tensors_of(output)
    if not tensors:
        raise BenchError(f"row {name!r}: output {type(output).__name__} holds no floating-point tensor to compare")
    bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
    if bad:
        total = sum(tensor.numel() for tensor in tensors)
        raise BenchError(
            f"row {name!r}: {bad} of {total} output values are nan or infinite; try another dtype or weights"
        )


def relative_error(reference: Sequence[Tensor], output: Sequence[Tensor]) -> float | None:
    """``||reference - output|| / ||reference||`` over all tensors; None where the reference is zero.

    Raises:
        BenchError: the shapes differ.
    """
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (reference, output)]
    if shapes[0] != shapes[1]:
        raise BenchError(f"output shapes {shapes[1]} differ from those of the dense model, {shapes[0]}")
    pairs = list(zip(reference, output, strict=True))
    signal = sum(float(expected.double().square().sum()) for expected, _ in pairs)
    noise = sum(float((expected.double() - got.double()).square().sum()) for expected, got in pairs)
    return math.sqrt(noise / signal) if signal else None


def decibels(relative: float | None) -> float | None:
    """Signal to error ratio in dB of a relative error; None where there is no error, or no signal."""
    return -20 * math.log10(relative) if relative else None


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes allocated at once by one call, on top of what was allocated before; its output is included.

    On CUDA this is the caching allocator's own statistic. On the CPU it is the running sum of every allocation that
    torch's allocator reports to the profiler: exact, but blind to scratch memory that libraries get elsewhere. None on
    other devices.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(profile_memory=True) as record:
        call()
    events = record.kineto_results.events()
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: int(event.start_ns()))
    return max(itertools.accumulate((int(event.nbytes()) for event in changes), initial=0))
