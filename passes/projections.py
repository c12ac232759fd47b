"""What an operand of an attention is projected from: the linear layers above it."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from bigain_fx.passes.axes import aten
from bigain_fx.passes.metric import without_casts


def projected_from(operand: Node) -> set[Node]:
    """What ``operand`` is projected from, through one linear layer or a sum of several in a row (LoRA)."""
    found = _nearest_inputs(operand)
    between = {node for node in found if (above := _nearest_inputs(node)) and above <= found - {node}}
    return found - between


def as_read(x: Node, operands: Iterable[Node]) -> Node:
    """``x`` as all of its projections read it: the cast of it, if they read the same one."""
    read = {node for operand in operands for node in _nearest_layers(operand)}
    seen = {layer.args[0] for layer in read if without_casts(layer.args[0]) is x}  # type: ignore[arg-type]
    return seen.pop() if len(seen) == 1 else x  # type: ignore[return-value]


def _nearest_inputs(operand: Node) -> set[Node]:
    """Inputs of the nearest linear layers above ``operand``, casts removed."""
    return {without_casts(layer.args[0]) for layer in _nearest_layers(operand)}  # type: ignore[arg-type]


def _nearest_layers(operand: Node) -> set[Node]:
    """The nearest linear layers above ``operand``."""
    found: set[Node] = set()
    pending, seen = [operand], {operand}
    while pending:
        node = pending.pop()
        if node.target is aten.linear.default:
            found.add(node)
            continue
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        pending.extend(new)
    return found
