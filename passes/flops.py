"""Floating-point operations of the nodes that matter: matrix products, convolutions, attention, and our plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.fx import Node

from bigain_fx.passes.axes import aten, shape_of
from bigain_fx.passes.ops import DECIDING, complete_cells

_CONVOLUTIONS = frozenset({
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
    aten.conv3d.padding,
})  # fmt: skip
_TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
_ADDED_PRODUCTS = frozenset({aten.addmm.default, aten.baddbmm.default})


def flops(nodes: Iterable[Node]) -> int:
    """Sum over ``nodes`` of 2 per multiply-add; element-wise work, norms and softmax are not counted."""
    return sum(_node_flops(node) for node in nodes)


def plan_flops(nodes: Iterable[Node]) -> int:
    """The part of :func:`flops` that deciding takes: similarities."""
    return flops(node for node in nodes if node.target in DECIDING)


def _node_flops(node: Node) -> int:
    if node.op != "call_function":
        return 0
    shapes = [shape_of(argument) for argument in node.args if isinstance(argument, Node)]
    out = math.prod(shape_of(node))
    match node.target:
        case aten.linear.default:
            return 2 * out * shapes[0][-1]
        case convolution if convolution in _CONVOLUTIONS:
            return 2 * out * math.prod(shapes[1][1:])
        case convolution if convolution in _TRANSPOSED:
            return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])
        case aten.scaled_dot_product_attention.default:
            scores = math.prod(shapes[0][:-1]) * shapes[1][-2]
            return 2 * scores * (shapes[0][-1] + shapes[2][-1])
        case product if product in _PRODUCTS:
            return 2 * out * shapes[0][-1]
        case product if product in _ADDED_PRODUCTS:
            return 2 * out * shapes[1][-1]
        case aten.einsum.default:
            equation, operands = node.args[:2]
            return _einsum_flops(str(equation), [shape_of(operand) for operand in operands], out)  # type: ignore[union-attr, arg-type]
        case torch.ops.bigain.merge_plan.default:
            (batch, tokens, channels), grid, cell = shapes[0], *node.args[1:3]
            cells = math.prod(complete_cells(grid, cell))  # type: ignore[arg-type]
            _, window = node.args[4:] if len(node.args) > 4 else (None, None)
            windows = tokens // math.prod(window) if window else 1  # type: ignore[arg-type]
            return 2 * batch * (tokens - cells) * (cells // windows) * channels
        case torch.ops.bigain.nearest_groups.default:
            (batch, tokens, channels), left = shapes[0], shapes[2][1]
            return 2 * batch * (tokens - left) * left * channels
    return 0


def _einsum_flops(equation: str, shapes: Sequence[tuple[int, ...]], out: int) -> int:
    """Of the sums over the letters that the ``out`` numbers of the result lack; a lone operand multiplies nothing.

    >>> _einsum_flops("b i d, b j d -> b i j", [(2, 5, 3), (2, 7, 3)], 2 * 5 * 7)
    420
    """
    if len(shapes) < 2:
        return 0
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    kept = output if arrow else [letter for letter in inputs if inputs.count(letter) == 1]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        before, _, after = term.partition("...")
        sizes |= dict(zip(before, shape, strict=False))
        sizes |= dict(zip(reversed(after), reversed(shape), strict=False))
    return 2 * out * math.prod(size for letter, size in sizes.items() if letter not in kept)
