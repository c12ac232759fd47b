"""Layouts: for each dimension of a tensor, the axes whose row-major product it is.

Splitting heads off the channels of ``x`` and moving them forward reads::

    x (2, 256, 32)            [batch, tokens, (32)]
    view (2, 256, 8, 4)       [batch, tokens, (8), (4)]
    transpose (2, 8, 256, 4)  [batch, (8), tokens, (4)]

Unnamed axes are channels, heads and the like. :data:`RIGID` axes are about to change their members: nothing may split,
mix or cut them. Other names are only followed. Where text stands before or after the image in one sequence, the axis is
a :class:`Segment`::

    cat([text (2, 5, 32), x])  [batch, (5 | tokens), (32)]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch.fx import Node

aten = torch.ops.aten

BATCH, TOKENS = "batch", "tokens"
RIGID = frozenset({BATCH, TOKENS})


@dataclass(frozen=True)
class Axis:
    """One axis: a name, empty if nobody follows it, and a size above 1."""

    name: str
    size: int

    @property
    def names(self) -> frozenset[str]:
        """Its name, if it has one."""
        return frozenset({self.name} - {""})


@dataclass(frozen=True)
class Segment:
    """An axis of which ``dim`` is one part: ``before`` and ``after`` count the other members."""

    before: int
    dim: Dim
    after: int

    @property
    def size(self) -> int:
        """All members."""
        return self.before + length(self.dim) + self.after

    @property
    def names(self) -> frozenset[str]:
        """The names of its part."""
        return names(self.dim)


Dim: TypeAlias = "tuple[Axis | Segment, ...]"
Layout = tuple[Dim, ...]


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be: one line, and the name of the node where it was seen."""

    reason: str
    node: str


def named(name: str, size: int) -> Dim:
    """A dimension of one axis; size 1 has none."""
    return (Axis(name, size),) if size != 1 else ()


def names(dim: Dim) -> frozenset[str]:
    """The names followed in ``dim``."""
    return frozenset().union(*(axis.names for axis in dim))


def length(dim: Dim) -> int:
    """The size of the dimension."""
    return math.prod(axis.size for axis in dim)


def shape_of(node: Node) -> tuple[int, ...]:
    """The static shape of ``node``'s tensor; ``()`` for what is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def segment(before: int, dim: Dim, after: int) -> Dim:
    """``dim`` with ``before`` others in front of it and ``after`` behind."""
    match dim:
        case (Segment(inner_before, inner, inner_after),):
            return segment(before + inner_before, inner, inner_after + after)
    return (Segment(before, dim, after),) if before or after else dim


def parts(dim: Dim) -> tuple[int, Dim, int]:
    """``before``, the followed axes, ``after``: the inverse of :func:`segment`."""
    match dim:
        case (Segment(before, inner, after),):
            return before, inner, after
    return 0, dim, 0


def cut(dim: Dim, start: int, stop: int) -> Dim | None:
    """Members ``start`` to ``stop`` of ``dim``; None if they are some, but not all, of those that are followed."""
    before, inner, _ = parts(dim)
    if not names(dim):
        return named("", stop - start)
    if start <= before and stop >= before + length(inner):
        return segment(before - start, inner, stop - before - length(inner))
    if stop <= before or start >= before + length(inner):
        return named("", stop - start)
    if not names(dim[:1]) and len(dim) > 1:
        outer, rest = dim[0], dim[1:]
        if start % length(rest) == 0 and stop % length(rest) == 0:
            return (*named("", (stop - start) * outer.size // length(dim)), *rest)
    return None


def resize(dim: Dim, sizes: dict[str, int]) -> Dim:
    """``dim`` with new sizes for some of its names."""
    return tuple(
        replace(axis, dim=resize(axis.dim, sizes)) if isinstance(axis, Segment)
        else Axis(axis.name, sizes.get(axis.name, axis.size))
        for axis in dim
    )  # fmt: skip


def regroup(layout: Layout, shape: tuple[int, ...]) -> Layout | None:
    """The same axes, in the same order, as dimensions of ``shape``; None if a rigid axis would be split."""
    pending = [axis for dim in layout for axis in dim]
    result: list[Dim] = []
    for size in shape:
        dim: list[Axis | Segment] = []
        while size > 1:
            if not pending:
                return None
            axis = pending.pop(0)
            if size % axis.size == 0:
                dim.append(axis)
                size //= axis.size
            elif isinstance(axis, Axis) and axis.size % size == 0 and axis.name not in RIGID:
                dim.append(Axis(axis.name, size))
                pending.insert(0, Axis("", axis.size // size))
                size = 1
            else:
                return None
        result.append(tuple(dim))
    return tuple(result)
