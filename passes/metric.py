"""Where the metric of a plan is read: the residual stream above the norm, or the attention's own input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from bigain_fx.passes.arguments import CASTS, NORMS, PERMUTATIONS, VIEWS, inactive_dropout
from bigain_fx.passes.axes import aten, shape_of

_AFFINE = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.mul.Scalar})


@dataclass(frozen=True)
class Metric:
    """``source``, seen through ``views`` (in graph order), is the metric ``(B, rows, C)``."""

    source: Node
    views: tuple[Node, ...] = ()


def stream(x: Node) -> Metric | None:
    """Return the input of the norm whose direct output ``x (B, rows, C)`` is, or None (docs/operators.md, "Metric")."""
    views: list[Node] = []
    node: Any = x
    while True:
        if node.target in NORMS:
            return Metric(node.args[0], tuple(reversed(views)))
        if (source := _spelled_rms_norm(node)) is not None:
            return Metric(source, tuple(reversed(views)))
        if node.target in VIEWS | PERMUTATIONS | CASTS or inactive_dropout(node):
            views.append(node)
            node = node.args[0]
            continue
        if node.target not in _AFFINE:
            return None
        same = [operand for operand in node.all_input_nodes if shape_of(operand) == shape_of(node)]
        whole = [operand for operand in same if not _is_constant(operand)]
        others = [operand for operand in node.all_input_nodes if operand not in whole]
        weighted = bool(others) and all(_is_channel_weight(operand) for operand in others)
        if len(whole) != 1 or not weighted:
            return None
        node = whole[0]


def _spelled_rms_norm(node: Node) -> Node | None:
    """``u`` if ``node`` is ``u * rsqrt(mean(u ** 2) + eps)`` or ``u / sqrt(mean(u ** 2) + eps)``."""
    operands: list[Any] = [item for item in node.args[:2] if isinstance(item, Node)]
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(operands) != 2:
        return None
    root = aten.rsqrt.default if node.target is aten.mul.Tensor else aten.sqrt.default
    for u, scale in (operands, operands[::-1])[: 1 if root is aten.sqrt.default else 2]:
        chain = without_casts(scale)
        if chain.target is root and (squared := _mean_of(without_casts(chain.args[0]))) is not None:  # type: ignore[arg-type]
            source = _squared(squared)
            if source is not None and without_casts(source) is without_casts(u):
                return without_casts(u)
    return None


def _mean_of(total: Node) -> Node | None:
    """``s`` if ``total`` is ``mean(s, -1, keepdim=True) + eps``."""
    mean = next((without_casts(item) for item in total.all_input_nodes), None)
    if total.target not in (aten.add.Tensor, aten.add.Scalar) or len(total.all_input_nodes) != 1 or mean is None:
        return None
    last = mean.target is aten.mean.dim and [*mean.args[1]] in ([-1], [len(shape_of(mean)) - 1])  # type: ignore[misc]
    return without_casts(mean.args[0]) if last else None  # type: ignore[arg-type]


def _squared(node: Node) -> Node | None:
    """``u`` if ``node`` is its square."""
    twice = node.target is aten.mul.Tensor and node.args[0] is node.args[1]
    power = node.target is aten.pow.Tensor_Scalar and node.args[1] == 2
    return node.args[0] if twice or power or node.target is aten.square.default else None  # type: ignore[return-value]


def _is_channel_weight(node: Node) -> bool:
    return math.prod(shape_of(node)[:-1]) == 1 and _is_constant(node)


def _is_constant(node: Node) -> bool:
    """Whether ``node`` is made of parameters alone."""
    return node.op == "get_attr" or (
        node.op == "call_function" and all(_is_constant(source) for source in node.all_input_nodes)
    )


def without_casts(node: Node) -> Node:
    """The node above ``node`` that holds the same values, up to their dtype and memory layout."""
    while node.target in CASTS or inactive_dropout(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
