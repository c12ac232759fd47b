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


def stream(x: Node, modulated: bool = False) -> Metric | None:
    """The input of the norm that ``x`` is the direct output of (``docs/operators.md``, "Metric"), None if of none.

    Args:
        x: ``(B, rows, C)``.
        modulated: pass over a scale, shift or gate between the norm and ``x``.
    """
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
        whole = [operand for operand in node.all_input_nodes if shape_of(operand) == shape_of(node)]
        others = [operand for operand in node.all_input_nodes if operand not in whole]
        weighted = bool(others) and all(_is_channel_weight(operand) for operand in others)
        if len(whole) != 1 or not (modulated or weighted):
            return None
        node = whole[0]


def _spelled_rms_norm(node: Node) -> Node | None:
    """``u`` if ``node`` is ``u * rsqrt(mean(u ** 2) + eps)``."""
    if node.target is not aten.mul.Tensor:
        return None
    for u, scale in (node.args[:2], node.args[1::-1]):
        chain: Any = scale
        for target in (aten.rsqrt.default, aten.add.Tensor, aten.mean.dim, aten.pow.Tensor_Scalar):
            chain = without_casts(chain) if isinstance(chain, Node) else None
            if chain is None or chain.target is not target:
                break
            chain = chain.args[0]
        else:
            if isinstance(u, Node) and without_casts(chain) is without_casts(u):
                return without_casts(u)
    return None


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
