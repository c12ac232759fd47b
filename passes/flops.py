"""Floating-point operations of the nodes that matter: matrix products, convolutions, attention, and our plan."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.fx import Node

from bigain_fx.passes.axes import aten, shape_of
from bigain_fx.passes.ops import complete_cells


def flops(nodes: Iterable[Node]) -> int:
    """Sum over ``nodes`` of 2 per multiply-add; element-wise work, norms and softmax are not counted."""
    return sum(_node_flops(node) for node in nodes)


def _node_flops(node: Node) -> int:
    if node.op != "call_function":
        return 0
    shapes = [shape_of(argument) for argument in node.args if isinstance(argument, Node)]
    out = math.prod(shape_of(node))
    match node.target:
        case aten.linear.default:
            return 2 * out * shapes[0][-1]
        case aten.conv2d.default | aten.conv2d.padding:
            return 2 * out * math.prod(shapes[1][1:])
        case aten.scaled_dot_product_attention.default:
            scores = math.prod(shapes[0][:-1]) * shapes[1][-2]
            return 2 * scores * (shapes[0][-1] + shapes[2][-1])
        case aten.matmul.default | aten.bmm.default | aten.mm.default:
            return 2 * out * shapes[0][-1]
        case torch.ops.bigain.merge_plan.default:
            (batch, tokens, channels), grid, cell = shapes[0], *node.args[1:3]
            cells = math.prod(complete_cells(grid, cell))  # type: ignore[arg-type]
            return 2 * batch * (tokens - cells) * cells * channels
    return 0
