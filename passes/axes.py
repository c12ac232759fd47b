"""Follow named axes of a tensor through a graph: one rule per op, a refusal where there is none.

A layout names, for each dimension of a tensor, the axes whose row-major product it is. Splitting heads off the
channels of ``x`` and moving them forward reads::

    x (2, 256, 32)            [batch, tokens, (32)]
    view (2, 256, 8, 4)       [batch, tokens, (8), (4)]
    transpose (2, 8, 256, 4)  [batch, (8), tokens, (4)]

Unnamed axes are channels, heads and the like. :data:`RIGID` axes are about to change their members: nothing may split,
mix or cut them, and ``tokens`` may not line up with a tensor from elsewhere. Other names are only followed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from bigain_fx.passes import ops as _ops  # noqa: F401  (registers torch.ops.bigain)

aten = torch.ops.aten

BATCH, TOKENS = "batch", "tokens"
RIGID = frozenset({BATCH, TOKENS})


@dataclass(frozen=True)
class Axis:
    """One axis: a name, empty if nobody follows it, and a size above 1."""

    name: str
    size: int


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be: one line, and the name of the node where it was seen."""

    reason: str
    node: str


def named(name: str, size: int) -> Dim:
    """A dimension of one axis; size 1 has none."""
    return (Axis(name, size),) if size != 1 else ()


def names(dim: Dim) -> set[str]:
    """The names followed in ``dim``."""
    return {axis.name for axis in dim if axis.name}


def shape_of(node: Node) -> tuple[int, ...]:
    """The static shape of ``node``'s tensor; ``()`` for what is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def propagate(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    """Layout of ``node`` from those of its operands; an operand without one comes from elsewhere.

    For an op with several results it is the layout of each, up to the sizes of unnamed dimensions.
    """
    rule = RULES.get(node.target)
    if rule is None:
        return Refusal(f"no rule for {node.target}", node.name)
    return rule(node, layouts)


def _fit(layout: Layout, shape: tuple[int, ...]) -> Layout:
    """``layout`` with its unnamed dimensions resized to ``shape``."""
    return tuple(dim if names(dim) else named("", size) for dim, size in zip(layout, shape, strict=True))


def regroup(layout: Layout, shape: tuple[int, ...]) -> Layout | None:
    """The same axes, in the same order, as dimensions of ``shape``; None if a rigid axis would be split."""
    pending = [axis for dim in layout for axis in dim]
    result: list[Dim] = []
    for size in shape:
        dim: list[Axis] = []
        while size > 1:
            if not pending:
                return None
            axis = pending.pop(0)
            if size % axis.size == 0:
                dim.append(axis)
                size //= axis.size
            elif axis.size % size == 0 and axis.name not in RIGID:
                dim.append(Axis(axis.name, size))
                pending.insert(0, Axis("", axis.size // size))
                size = 1
            else:
                return None
        result.append(tuple(dim))
    return tuple(result)


def _view(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    result = regroup(layouts[node.args[0]], shape_of(node))  # type: ignore[index]
    return result if result is not None else Refusal("tokens are split or regrouped", node.name)


def _permutation(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    layout = list(layouts[node.args[0]])  # type: ignore[index]
    if node.target is aten.transpose.int:
        first, second = node.args[1], node.args[2]
        layout[first], layout[second] = layout[second], layout[first]  # type: ignore[index]
        return tuple(layout)
    return tuple(layout[index] for index in node.args[1])  # type: ignore[union-attr,index]


def _pointwise(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    shape = shape_of(node)
    result: list[Dim] = [named("", size) for size in shape]
    operands = [(argument, shape_of(argument)) for argument in node.all_input_nodes]
    for argument, sizes in operands:
        for position, dim in enumerate(layouts.get(argument, ()), start=len(shape) - len(sizes)):
            if names(dim) and names(result[position]) and dim != result[position]:
                return Refusal("two orders of tokens meet", node.name)
            if names(dim):
                result[position] = dim
    for argument, sizes in operands:
        for position, size in enumerate(sizes, start=len(shape) - len(sizes)):
            tokens = TOKENS in names(result[position])
            known = argument in layouts and layouts[argument][position - len(shape) + len(sizes)] == result[position]
            if tokens and size > 1 and not known:
                return Refusal(f"meets {argument.name}, which has a value for every token", node.name)
    return tuple(result)


def _over_channels(first: Callable[[Node, Layout], int]) -> Callable[[Node, Mapping[Node, Layout]], Layout | Refusal]:
    """Rule of an op that mixes the dimensions from ``first`` on, and leaves the others in place."""

    def rule(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
        source = node.args[0]
        if source not in layouts:
            return Refusal("reads its tokens from elsewhere", node.name)
        layout = layouts[source]  # type: ignore[index]
        if any(argument in layouts for argument in node.all_input_nodes if argument is not source):
            return Refusal("its weights depend on the tokens", node.name)
        if any(names(dim) & RIGID for dim in layout[first(node, layout) :]):
            return Refusal("tokens are mixed", node.name)
        return _fit(layout, shape_of(node))

    return rule


def _mean(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    layout = layouts[node.args[0]]  # type: ignore[index]
    dims = {int(dim) % len(layout) for dim in node.args[1] or range(len(layout))}  # type: ignore[union-attr,arg-type]
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    if any(names(layout[dim]) & RIGID for dim in dims):
        return Refusal("tokens are mixed", node.name)
    return tuple(() if index in dims else dim for index, dim in enumerate(layout) if keep or index not in dims)


def _cut(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    layout = layouts[node.args[0]]  # type: ignore[index]
    position = {aten.slice.Tensor: 1, aten.select.int: 1, aten.unbind.int: 1}.get(node.target, 2)  # type: ignore[call-overload]
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    dim = int(dim) % len(layout)  # type: ignore[arg-type]
    if names(layout[dim]):
        return Refusal("tokens are cut or picked", node.name)
    if node.target in (aten.select.int, aten.unbind.int):
        return layout[:dim] + layout[dim + 1 :]
    return layout if node.target is not aten.slice.Tensor else _fit(layout, shape_of(node))


def _unflatten(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    layout = layouts[node.args[0]]  # type: ignore[index]
    if names(layout[node.args[1]]) & RIGID:  # type: ignore[index]
        return Refusal("tokens are split or regrouped", node.name)
    return _view(node, layouts)


def _item(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    return _fit(layouts[node.args[0]], shape_of(node))  # type: ignore[index]


def _concatenation(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    if any(part not in layouts for part in parts):
        return Refusal("joined with tokens from elsewhere", node.name)
    dim = int(node.args[1]) % len(shape_of(node)) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    kept = [tuple(() if index == dim else d for index, d in enumerate(_fit(layouts[p], shape_of(p)))) for p in parts]
    if any(names(layouts[part][dim]) for part in parts):
        return Refusal("tokens are joined with others", node.name)
    if any(other != kept[0] for other in kept):
        return Refusal("two orders of tokens meet", node.name)
    return _fit(layouts[parts[0]], shape_of(node))


def _dropout(node: Node, layouts: Mapping[Node, Layout]) -> Layout | Refusal:
    if not inactive_dropout(node):
        return Refusal("dropout is active", node.name)
    return _pointwise(node, layouts)


def inactive_dropout(node: Node) -> bool:
    """Whether ``node`` is a dropout that does nothing."""
    if node.target is not aten.dropout.default:
        return False
    _, probability, train = node.args
    return bool(probability == 0 or not train)


CASTS = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.detach.default,
})  # fmt: skip
VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
})  # fmt: skip
PERMUTATIONS = frozenset({aten.permute.default, aten.transpose.int})
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default})
POINTWISE = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add.Scalar, aten.mul.Scalar,
    aten.div.Scalar, aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sqrt.default, aten.exp.default,
    aten.tanh.default, aten.sigmoid.default, aten.silu.default, aten.gelu.default, aten.relu.default,
    aten.clamp.default,
})  # fmt: skip

RULES: dict[Any, Callable[[Node, Mapping[Node, Layout]], Layout | Refusal]] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(PERMUTATIONS, _permutation),
    **dict.fromkeys(CASTS | POINTWISE, _pointwise),
    **dict.fromkeys(
        (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, aten.select.int,
         aten.unbind.int), _cut,
    ),
    aten.unflatten.int: _unflatten,
    operator.getitem: _item,
    aten.cat.default: _concatenation,
    aten.dropout.default: _dropout,
    aten.mean.dim: _mean,
    aten.linear.default: _over_channels(lambda node, layout: len(layout) - 1),
    aten.layer_norm.default: _over_channels(lambda node, layout: len(layout) - len(node.args[1])),  # type: ignore[arg-type]
    aten.rms_norm.default: _over_channels(lambda node, layout: len(layout) - len(node.args[1])),  # type: ignore[arg-type]
    aten.group_norm.default: _over_channels(lambda node, layout: 1),
}  # fmt: skip
