"""A graph of Dynamo's for the sizes and numbers of this call alone, whatever ``torch.compile`` was told of ``dynamic``.

Where a size changes from call to call, Dynamo asks the backend for one graph of symbolic sizes. To read a symbol as a
number is to have Dynamo guard on it: the graph is then compiled again for another one, as with ``dynamic=False``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import TensorPropertySource
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from bigain_fx.passes.errors import InputError

log = logging.getLogger("bigain_fx")

Compile = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]
Number = torch.SymInt | torch.SymFloat | torch.SymBool


def statically(
    gm: GraphModule, example_inputs: Sequence[Any], compile: Compile, name_of: Callable[[str], str]
) -> Callable[..., Any]:
    """What ``compile`` makes of ``gm`` with sizes as they are, taking the inputs of ``gm``.

    Args:
        gm: from Dynamo; it stays as it is.
        example_inputs: its inputs.
        compile: takes a graph without symbols, and its inputs. A symbol that is no number yet stays one.
        name_of: the name of an input, of what Dynamo calls it.

    Raises:
        InputError: an input is marked as dynamic.
    """
    if not any(_is_symbolic(node.meta["example_value"]) for node in gm.graph.find_nodes(op="placeholder")):
        return compile(gm, example_inputs)
    for node in gm.graph.find_nodes(op="placeholder"):
        _look_at(node, name_of)
    fixed = GraphModule(gm, _copied(gm))
    fixed.meta.update(gm.meta)
    kept: list[int] = []
    for place, node in enumerate(list(fixed.graph.find_nodes(op="placeholder"))):
        value = node.meta["example_value"]
        value = _now(value) if _is_symbolic(value) else value
        if isinstance(value, Tensor | Number):
            node.meta["example_value"] = value
            kept.append(place)
        else:
            node.replace_all_uses_with(value)
            fixed.graph.erase_node(node)
    nodes = fixed.graph.find_nodes(op="placeholder")
    examples = [
        node.meta["example_value"] if isinstance(example_inputs[place], FakeTensor) else example_inputs[place]
        for node, place in zip(nodes, kept, strict=True)
    ]
    fixed.recompile()
    run = compile(fixed, examples)
    return lambda *inputs: run(*(inputs[place] for place in kept))


def _look_at(node: Node, name_of: Callable[[str], str]) -> None:
    """Refuse an input that is to have one graph for all sizes; say of a number that it has a graph for each value."""
    argument, value = node.meta["grapharg"], node.meta["example_value"]
    name = name_of(argument.source.name)
    if getattr(argument.example, "_dynamo_dynamic_indices", None):
        raise InputError(f"{name} is marked as dynamic, and 'bigain' compiles for one size; leave mark_dynamic out")
    changes = isinstance(value, torch.SymInt) and not isinstance(argument.source, TensorPropertySource)
    if changes and torch._dynamo.config.assume_static_by_default:
        log.warning(
            "%s changes from call to call, and each number has its own graph, up to "
            "torch._dynamo.config.recompile_limit of them; pass it as a tensor", name,
        )  # fmt: skip


def _copied(gm: GraphModule) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for old, new in copies.items():
        if (source := getattr(old, "_dynamo_source", None)) is not None:
            new._dynamo_source = source
    return graph


def _is_symbolic(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return isinstance(value, Number)
    return not all(isinstance(size, int) for size in (*value.shape, *value.stride(), value.storage_offset()))


def _now(value: Any) -> Any:
    """``value`` without symbols, if Dynamo knows what they stand for at this call."""
    try:
        if type(value) is FakeTensor:
            shape, strides = (tuple(map(int, numbers)) for numbers in (value.shape, value.stride()))
            with value.fake_mode:
                offset = int(value.storage_offset())
                whole = torch.empty(offset + _extent(shape, strides), dtype=value.dtype, device=value.device)
                return whole.as_strided(shape, strides, offset).requires_grad_(value.requires_grad)
        if isinstance(value, torch.SymInt):
            return int(value)
        return float(value) if isinstance(value, torch.SymFloat) else value
    except Exception:  # a size that hangs on values has no number
        return value


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
