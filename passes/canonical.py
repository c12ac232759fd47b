"""Bring a captured graph to the form that the matcher reads: every dependence is one of values.

A tensor that another op reads for its dtype or shape alone is not read any more. Writes into a slice (rotary embeddings
of the image rows alone) become values::

    part = t[:, :, a:b]                        whole = cat([t[:, :, :a], value, t[:, :, b:]], 2)
    part.copy_(value)                   ->     read(whole)
    read(t)

and so does arithmetic in place, ``h += y``, where nothing reads the old memory afterwards under another name. Equal
views of one tensor (every attention unsqueezes the rotary angles anew) become one node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Node

from bigain_fx.passes.arguments import CASTS, IN_PLACE, VIEWS, cut_dim, slice_range
from bigain_fx.passes.axes import aten, shape_of
from bigain_fx.passes.memory import aliases, roots, written
from bigain_fx.passes.surgery import Surgeon


def _dtype(node: Node) -> tuple[Any, ...]:
    return (node.meta["val"].dtype,)


def _sizes(node: Node) -> tuple[Any, ...]:
    return (list(shape_of(node)),)


def _bounds(narrow: Node) -> tuple[Any, ...]:
    dim, start, size = (int(argument) for argument in narrow.args[1:])  # type: ignore[arg-type]
    start %= shape_of(narrow.args[0])[dim]  # type: ignore[arg-type]
    return dim, start, start + size


_PLAIN: Mapping[Any, tuple[Any, Callable[[Node], tuple[Any, ...]]]] = {
    aten.type_as.default: (aten.to.dtype, _dtype), aten.to.other: (aten.to.dtype, _dtype),
    aten.expand_as.default: (aten.expand.default, _sizes), aten.view_as.default: (aten.view.default, _sizes),
    aten.reshape_as.default: (aten.reshape.default, _sizes), aten.narrow.default: (aten.slice.Tensor, _bounds),
}  # fmt: skip


_SHARED = VIEWS | CASTS | {aten.slice.Tensor, aten.expand.default}


def canonicalize(surgeon: Surgeon) -> None:
    """Rewrite the graph in place; what it computes stays the same."""
    surgeon.inline_contexts()
    surgeon.clean()
    for node in [node for node in surgeon.graph.nodes if node.target in _PLAIN]:
        target, arguments = _PLAIN[node.target]
        with surgeon.after(node):
            node.replace_all_uses_with(surgeon.emit(target, (node.args[0], *arguments(node)), node))
        surgeon.graph.erase_node(node)
    for copy in [node for node in surgeon.graph.nodes if node.target is aten.copy_.default]:
        part: Any = copy.args[0]
        if part.target is aten.slice.Tensor and not copy.users and _is_alone(part, copy):
            _replace(surgeon, copy, part)
    for node in [node for node in surgeon.graph.nodes if node.target in IN_PLACE]:
        if not _names_read_after(node):
            _as_value(surgeon, node)
    _share_views(surgeon)


def _is_alone(part: Node, copy: Node) -> bool:
    """Whether what ``copy`` changed is read, after it, through the tensor that ``part`` is cut from alone."""
    return slice_range(part)[2] == 1 and _names_read_after(copy) <= {part.args[0]}


def _names_read_after(write: Node) -> set[Any]:
    """What shows, under an older name, the memory that ``write`` changes, and is read later; unknown of an input's."""
    target: Any = write.args[0]
    if any(root.op != "call_function" for root in roots(target)):
        return {None}
    older = {alias for alias in aliases(target) if alias < write}
    return {alias for alias in older if any(user > write for user in alias.users)}


def _share_views(surgeon: Surgeon) -> None:
    """Read the first of several equal views or casts, unless somebody writes into what they show or are made of."""
    first: dict[str, Node] = {}
    changing = {alias for node in surgeon.graph.nodes for target in written(node) for alias in aliases(target)}
    for node in [node for node in surgeon.graph.nodes if node.target in _SHARED]:
        same = first.setdefault(str((node.target, node.args, node.kwargs)), node)
        if same is not node and not changing & {same, node, *node.all_input_nodes}:
            node.replace_all_uses_with(same)
            surgeon.graph.erase_node(node)


def _as_value(surgeon: Surgeon, node: Node) -> None:
    """The same arithmetic with a result of its own, in the dtype that the memory has."""
    with surgeon.after(node):
        value = surgeon.emit(IN_PLACE[node.target], node.args, node, node.kwargs)
        if value.meta["val"].dtype != node.meta["val"].dtype:
            value = surgeon.emit(aten.to.dtype, (value, node.meta["val"].dtype), node)
    node.replace_all_uses_with(value, lambda user: user is not value)
    surgeon.graph.erase_node(node)


def _replace(surgeon: Surgeon, copy: Node, part: Node) -> None:
    whole: Any = part.args[0]
    value: Any = copy.args[1]
    dim, (start, stop, _), like = cut_dim(part), slice_range(part), part
    size = shape_of(whole)[dim]
    with surgeon.after(copy):
        if shape_of(value) != shape_of(part):
            value = surgeon.emit(aten.expand.default, (value, list(shape_of(part))), like)
        if value.meta["val"].dtype != whole.meta["val"].dtype:
            value = surgeon.emit(aten.to.dtype, (value, whole.meta["val"].dtype), like)
        ends = [surgeon.emit(aten.slice.Tensor, (whole, dim, *end), like) for end in ((0, start), (stop, size))
                if end[0] < end[1]]  # fmt: skip
        pieces = [*ends[: bool(start)], value, *ends[bool(start) :]]
        result = surgeon.emit(aten.cat.default, (pieces, dim), like)
    readers = [user for user in whole.users if user > copy and user not in ends]
    for user in readers:
        user.replace_input_with(whole, result)
    surgeon.graph.erase_node(copy)
    if not part.users:
        surgeon.graph.erase_node(part)
