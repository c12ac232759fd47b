"""Which nodes show the same memory, what writes into it, and when.

A graph says what depends on what by value. Memory is what it leaves out: a view, the tensor that it is a view of, and
all other views of that are names of one memory, and a write through any of them changes what the others show::

    y (2, 24, 16)                      x = y.view(2, 24, 16); y.mul_(0.5)
    roots(x) = {y}                     aliases(x) = {y, x, mul_}
                                       written_by(x) = mul_, for it comes after x
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Set
from functools import cache
from typing import Any

from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from bigain_fx.passes.arguments import inactive_dropout
from bigain_fx.passes.axes import aten

# What may return its input, or a view of it, though its schema does not say so (dropout: see inactive_dropout).
_UNMARKED = frozenset({
    aten.type_as, aten.einsum, aten.meshgrid, aten.broadcast_tensors, aten.atleast_1d, aten.atleast_2d, aten.atleast_3d,
    aten.cartesian_prod, aten.sum_to_size, aten.conj_physical, aten.unsafe_chunk, aten.unsafe_split,
    aten.unsafe_split_with_sizes, aten._unsafe_view, aten.lift, aten.alpha_dropout, aten.feature_dropout,
    aten.feature_alpha_dropout,
})  # fmt: skip
# Their schemas say that they write; the numbers stay.
_NO_WRITES = frozenset({aten.detach_.default, aten.requires_grad_.default})


def shown_by(node: Node) -> tuple[Node, ...]:
    """The inputs of ``node`` whose memory it, or one of its results, may show."""
    target: Any = node.target
    if target is operator.getitem:
        source: Any = node.args[0]
        # The results of an operator that shows nothing are apart; of any other call nothing is known.
        return (source,) if shown_by(source) or not isinstance(source.target, OpOverload) else ()
    if isinstance(target, HigherOrderOperator):
        return tuple(node.all_input_nodes)
    if not isinstance(target, OpOverload):
        return ()
    if inactive_dropout(node):
        return _nodes(node.args[0])
    if target.overloadpacket in _UNMARKED:
        return tuple(node.all_input_nodes)
    shown, _, results = _marks(target)
    return _given(node, shown) if results and shown else ()


def written(node: Node) -> tuple[Node, ...]:
    """The inputs of ``node`` whose memory it changes in place."""
    if isinstance(node.target, HigherOrderOperator):
        return _written_inside(node)
    if not isinstance(node.target, OpOverload) or node.target in _NO_WRITES:
        return ()
    _, changed, _ = _marks(node.target)
    return _given(node, changed) if changed else ()


def roots(node: Node) -> Set[Node]:
    """Where the memory that ``node`` may show comes from: the node itself, or what it is a view of."""
    pending, found, seen = [node], set(), {node}
    while pending:
        sources = shown_by(here := pending.pop())
        if not sources:
            found.add(here)
        pending.extend(source for source in sources if source not in seen)
        seen.update(sources)
    return found


def aliases(node: Node) -> Set[Node]:
    """All nodes that may show some of the memory that ``node`` shows, itself included."""
    pending = list(roots(node))
    found = set(pending)
    while pending:
        here = pending.pop()
        new = [user for user in here.users if user not in found and here in shown_by(user)]
        pending.extend(new)
        found.update(new)
    return found


def written_by(node: Node, until: Node | None = None) -> Node | None:
    """The first that changes the memory of ``node``, under any name, after ``node`` and before ``until``, if given."""
    writers = (
        user
        for alias in aliases(node)
        for user in alias.users
        if user > node and (until is None or user < until) and alias in written(user)
    )
    return min(writers, default=None)


def descendants(nodes: Iterable[Node], graph: Graph) -> Set[Node]:
    """``nodes`` and all that depends on them, by value or through memory that is written."""
    found = set(nodes)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
            for target in written(node):
                found |= aliases(target)
    return found


@cache
def _marks(target: OpOverload) -> tuple[tuple[tuple[int, str], ...], tuple[tuple[int, str], ...], bool]:
    """The arguments that results may share memory with, those that are written, and whether any result does."""
    marked = [
        (position, argument.name, argument.alias_info.is_write)
        for position, argument in enumerate(target._schema.arguments)
        if argument.alias_info is not None
    ]
    shown = tuple((position, name) for position, name, _ in marked)
    changed = tuple((position, name) for position, name, is_write in marked if is_write)
    return shown, changed, any(result.alias_info is not None for result in target._schema.returns)


def _given(node: Node, arguments: Iterable[tuple[int, str]]) -> tuple[Node, ...]:
    """The nodes that ``arguments``, by position and name, hold; some may be lists."""
    values = [
        node.args[position] if position < len(node.args) else node.kwargs.get(name) for position, name in arguments
    ]
    return _nodes(values)


def _nodes(values: Any) -> tuple[Node, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Node))


def _written_inside(call: Node) -> tuple[Node, ...]:
    """What the graphs that ``call`` runs write into; all of its inputs where there are none to look into."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    owner = call.graph.owning_module
    bodies = [
        body
        for leaf in leaves
        if isinstance(leaf, Node) and leaf.op == "get_attr"
        if isinstance(body := getattr(owner, str(leaf.target), None), GraphModule)
    ]
    found: list[Node] = []
    for body in bodies:
        inner = list(body.graph.find_nodes(op="placeholder"))
        outer = dict(zip(inner, leaves[len(leaves) - len(inner) :], strict=True))
        changed = {root for node in body.graph.nodes for target in written(node) for root in roots(target)}
        found += [outer[root] for root in changed if isinstance(outer.get(root), Node)]
    return tuple(found) if bodies else _nodes(leaves)
