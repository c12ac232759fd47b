"""What kind of op a node is, and what its arguments say: which dimension it cuts, where; its mask."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.fx import Node

from bigain_fx.passes.axes import aten, shape_of

SDPA = aten.scaled_dot_product_attention.default
SPLITS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})
CONCATENATIONS = frozenset({aten.cat.default, aten.concat.default})
CASTS = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
})  # fmt: skip
VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
})  # fmt: skip
PERMUTATIONS = frozenset({aten.permute.default, aten.transpose.int})
POINTWISE = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add.Scalar, aten.mul.Scalar,
    aten.div.Scalar, aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sqrt.default, aten.exp.default,
    aten.tanh.default, aten.sigmoid.default, aten.silu.default, aten.gelu.default, aten.relu.default,
    aten.clamp.default, aten.clamp_min.default, aten.where.self, aten.masked_fill.Scalar, aten.square.default,
    aten.rsub.Scalar, aten.reciprocal.default, aten.abs.default, aten.softplus.default, aten.leaky_relu.default,
})  # fmt: skip
# Each of them that can write its result into its first operand, as that form -> what it computes.
IN_PLACE: Mapping[Any, Any] = {
    getattr(packet, op._overloadname): op
    for op in POINTWISE
    if (packet := getattr(aten, f"{op.overloadpacket.__name__}_", None)) and op._overloadname in packet.overloads()
}
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default})


def mask_of(sdpa: Node) -> Node | None:
    """The mask of an attention, if it has one."""
    mask = sdpa.args[3] if len(sdpa.args) > 3 else sdpa.kwargs.get("attn_mask")
    return mask if isinstance(mask, Node) else None


def inactive_dropout(node: Node) -> bool:
    """Whether ``node`` is a dropout that does nothing."""
    if node.target is not aten.dropout.default:
        return False
    _, probability, train = node.args
    return bool(probability == 0 or not train)


def cut_dim(node: Node) -> int:
    """The dimension that a slice, select or split cuts, from 0."""
    position = 1 if node.target in (aten.slice.Tensor, aten.select.int, aten.unbind.int) else 2
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return int(dim) % len(shape_of(node.args[0]))  # type: ignore[arg-type]


def slice_range(node: Node) -> tuple[int, int, int]:
    """Start, stop and step of an ``aten.slice``, within the size that it cuts; step 0 if they are computed."""
    size = shape_of(node.args[0])[cut_dim(node)]  # type: ignore[arg-type]
    bounds: list[Any] = [*node.args[2:], None, None, None]
    if any(isinstance(bound, Node) for bound in bounds):
        return 0, size, 0
    return slice(*bounds[:3]).indices(size)


def item_range(node: Node) -> tuple[int, int]:
    """Start and stop of result ``node`` of a split, along the dimension that it cuts."""
    split: Any = node.args[0]
    sizes = [value.shape[cut_dim(split)] for value in split.meta["val"]]
    index: Any = node.args[1]
    return sum(sizes[:index]), sum(sizes[: index + 1])


def join_dim(node: Node) -> int:
    """The dimension along which a concatenation or stack joins, from 0."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return int(dim) % len(shape_of(node))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ChannelParts:
    """A linear layer's output, cut into ranges of channels.

    Attributes:
        ranges: each node that holds one part, with its first channel and the one after its last.
        carriers: the linear layer and the splits: nothing else reads them.
    """

    ranges: Mapping[Node, tuple[int, int]]
    carriers: tuple[Node, ...]

    @property
    def overlap(self) -> bool:
        """Whether some channels are in more than one part."""
        return any(first[1] > second[0] for first, second in pairwise(sorted(self.ranges.values())))


def channel_parts(linear: Node, wanted: Set[Node] | None = None) -> ChannelParts:
    """The parts of ``linear``, none if it is no linear layer or something reads all of it.

    Args:
        linear: the layer; its parts may be cut again.
        wanted: cut no further than to tell these nodes from others; None cuts as far as the graph does.
    """
    ranges: dict[Node, tuple[int, int]] = {}
    carriers: list[Node] = []

    def cut_up(node: Node, first: int) -> bool:
        parts, splits = _cuts(node)
        if not parts:
            return False
        carriers.extend([node, *splits])
        for part, (start, stop) in parts.items():
            inner = _cuts(part)[0].keys()
            further = wanted is None or (part in wanted and not inner <= wanted)
            if not (further and cut_up(part, first + start)):
                ranges[part] = (first + start, first + stop)
        return True

    if linear.target is aten.linear.default:
        cut_up(linear, 0)
    return ChannelParts(ranges, tuple(carriers))


def _cuts(node: Node) -> tuple[dict[Node, tuple[int, int]], list[Node]]:
    """The ranges of channels that ``node`` is cut into, and the splits between; nothing if it is read otherwise."""
    last = len(shape_of(node)) - 1
    parts: dict[Node, tuple[int, int]] = {}
    splits: list[Node] = []
    for user in node.users:
        if user.target in SPLITS and cut_dim(user) == last:
            splits.append(user)
            parts |= {item: item_range(item) for item in user.users}
        elif user.target is aten.slice.Tensor and cut_dim(user) == last and slice_range(user)[2] == 1:
            parts[user] = slice_range(user)[:2]
        else:
            return {}, []
    return parts, splits
