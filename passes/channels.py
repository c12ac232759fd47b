"""Parts of a linear layer's output, where several projections share the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from bigain_fx.passes.axes import aten, shape_of
from bigain_fx.passes.rules import SPLITS, cut_dim, item_range, slice_range


@dataclass(frozen=True)
class ChannelParts:
    """A linear layer's output, cut into ranges of channels.

    Attributes:
        ranges: each node that holds one part, with its first channel and the one after its last.
        carriers: the linear layer and the splits: nothing else reads them.
    """

    ranges: Mapping[Node, tuple[int, int]]
    carriers: tuple[Node, ...]


_WHOLE = ChannelParts({}, ())


def channel_parts(linear: Node) -> ChannelParts:
    """The parts of ``linear``, none if it is no linear layer or something reads all of it."""
    if linear.target is not aten.linear.default:
        return _WHOLE
    last = len(shape_of(linear)) - 1
    ranges: dict[Node, tuple[int, int]] = {}
    carriers = [linear]
    for user in linear.users:
        if user.target in SPLITS and cut_dim(user) == last:
            carriers.append(user)
            ranges |= {item: item_range(item) for item in user.users}
        elif user.target is aten.slice.Tensor and cut_dim(user) == last and slice_range(user)[2] == 1:
            ranges[user] = slice_range(user)[:2]
        else:
            return _WHOLE
    return ChannelParts(ranges, tuple(carriers))
