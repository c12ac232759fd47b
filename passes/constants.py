"""Rewrite: what depends on no input becomes its value, where an exporter could not say how it is made.

::

    t = polar(ones, mul(arange, f))            t = get_attr(bigain_polar)
    q = linalg_qr(weight)[0]            ->     q = get_attr(bigain_getitem)
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from bigain_fx.passes.memory import roots, written
from bigain_fx.passes.surgery import Surgeon


def folded(module: GraphModule, wanted: Callable[[Node], bool]) -> GraphModule:
    """Return ``module`` with no constant that is ``wanted`` or made from such: a new graph if it has any wanted node.

    Args:
        module: an ATen graph whose nodes carry ``meta["val"]``; what is left of its weights is shared.
        wanted: whether a node should be a value; it stays as it is where it depends on an input.
    """
    if not any(map(wanted, module.graph.nodes)):
        return module
    result = GraphModule(module, copy.deepcopy(module.graph))
    surgeon = Surgeon(result)
    surgeon.clean()
    concerned = set(filter(wanted, surgeon.graph.nodes))
    constant = constants(surgeon.graph)
    values: dict[Node, Any] = {}
    for node in [node for node in surgeon.graph.nodes if node in constant]:
        if concerned.intersection(node.all_input_nodes):
            concerned.add(node)
        if node not in concerned or node.op == "get_attr" or constant.issuperset(node.users):
            continue
        _work_out(result, node, values)
        node.replace_all_uses_with(surgeon.constant(f"bigain_{node.name}", values[node].contiguous(), node))
    return GraphModule(result, surgeon.finish().graph)  # leaves behind what nothing reads any more


def constants(graph: Graph) -> set[Node]:
    """What depends on no input and on no chance, and is never written to."""
    changed = {root for node in graph.nodes for memory in written(node) for root in roots(memory)}
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            fixed = isinstance(node.meta.get("val"), Tensor)
        elif isinstance(node.target, OpOverload):
            fixed = not written(node) and torch.Tag.nondeterministic_seeded not in node.target.tags
        else:
            fixed = node.target is operator.getitem
        if fixed and found.issuperset(node.all_input_nodes) and not changed & roots(node):
            found.add(node)
    return found


@torch.no_grad()
def _work_out(module: GraphModule, node: Node, values: dict[Node, Any]) -> None:
    """Put the value of a constant, and those of all that it is made from, into ``values``."""
    pending, needed = [node], set[Node]()
    while pending:
        source = pending.pop()
        if source not in values and source not in needed:
            needed.add(source)
            pending += source.all_input_nodes
    for source in sorted(needed):
        if source.op == "get_attr":
            values[source] = operator.attrgetter(str(source.target))(module).detach()
        else:
            given: Any = map_arg((source.args, source.kwargs), lambda item: values[item])
            values[source] = source.target(*given[0], **given[1])  # type: ignore[operator]
