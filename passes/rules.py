"""Follow layouts through a graph: one rule per op, a refusal where there is none."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.fx import Node

from bigain_fx.passes import ops as _ops  # noqa: F401  (registers torch.ops.bigain)
from bigain_fx.passes.arguments import (
    CASTS,
    CONCATENATIONS,
    IN_PLACE,
    PERMUTATIONS,
    POINTWISE,
    SDPA,
    SPLITS,
    VIEWS,
    cut_dim,
    inactive_dropout,
    item_range,
    join_dim,
    mask_of,
    slice_range,
)
from bigain_fx.passes.axes import (
    RIGID,
    TOKENS,
    Dim,
    Layout,
    Refusal,
    aten,
    cut,
    named,
    names,
    regroup,
    segment,
    shape_of,
)
from bigain_fx.passes.memory import aliases, written

Layouts = Mapping[Node, Layout]
_JOINS = POINTWISE | CONCATENATIONS | {aten.stack.default, aten.pad_sequence.default}
PLACE_BY_PLACE = frozenset({*IN_PLACE, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default})
Rule = Callable[[Node, Layouts], Layout | Refusal]


def propagate(node: Node, layouts: Layouts) -> Layout | Refusal:
    """Layout of ``node`` from those of its operands; an operand without one comes from elsewhere.

    For an op with several results it is the layout of each, up to the sizes of unnamed dimensions, and before the
    dimension that it cuts is cut.
    """
    rule = RULES.get(node.target)
    if rule is None:
        return Refusal(f"no rule for {node.target}", node.name)
    if node.args[0] not in layouts and node.target not in _JOINS:
        return Refusal("reads its tokens from elsewhere", node.name)
    return rule(node, layouts)


def forget(node: Node, layouts: dict[Node, Layout]) -> None:
    """Drop from ``layouts`` what ``node`` overwrites, unless each token is changed where it lies."""
    for target in written(node):
        others = [source for source in node.all_input_nodes if source is not target and source in layouts]
        in_order = not others or _pointwise(node, layouts) == layouts.get(target)
        if node.target not in PLACE_BY_PLACE or not in_order:
            for alias in aliases(target):
                layouts.pop(alias, None)


def lined_up(node: Node, layout: Layout, layouts: Layouts) -> Layout:
    """The layout that operands of ``node`` line up with, from the last dimension on; ``()`` where none may."""
    if node.target is SDPA:
        key: Any = node.args[1]
        return (*layout[:-1], layouts[key][-2] if key in layouts else ())
    if node.target in CONCATENATIONS:
        return _but(join_dim(node), layout)
    return layout if node.target in POINTWISE else ()


def from_elsewhere(node: Node, layout: Layout, layouts: Layouts) -> dict[Node, tuple[int, ...]]:
    """Operands without a layout that have a value for every token, and which of their dimensions, from the last, do.

    They are what a change of the tokens must reach too: rotary angles, masks.
    """
    layout = lined_up(node, layout, layouts)
    mask = [mask_of(node)] if node.target is SDPA else []
    found: dict[Node, tuple[int, ...]] = {}
    for operand in mask or node.all_input_nodes:
        dims = (
            tuple(
                position
                for position, size in zip(range(-1, -len(layout) - 1, -1), reversed(shape_of(operand)), strict=False)
                if size > 1 and TOKENS in names(layout[position])
            )
            if operand
            else ()
        )
        if operand and dims and operand not in layouts:
            found[operand] = dims
    return found


def _fit(layout: Layout, shape: tuple[int, ...]) -> Layout:
    """``layout`` with its unnamed dimensions resized to ``shape``."""
    return tuple(dim if names(dim) else named("", size) for dim, size in zip(layout, shape, strict=True))


def _meet(node: Node, shape: tuple[int, ...], operands: Iterable[Node], layouts: Layouts) -> Layout | Refusal:
    """The layout of what lines up ``operands`` from the last dimension on."""
    result: list[Dim] = [named("", size) for size in shape]
    known = [(layouts[operand], shape_of(operand)) for operand in operands if operand in layouts]
    for layout, sizes in known:
        for position, dim in enumerate(layout, start=len(shape) - len(sizes)):
            if names(dim) and names(result[position]) and dim != result[position]:
                return Refusal("two orders of tokens meet", node.name)
            if names(dim):
                result[position] = dim
    for layout, sizes in known:
        for position, dim in enumerate(layout, start=len(shape) - len(sizes)):
            if dim and dim != result[position] and names(result[position]) & RIGID:
                return Refusal("two orders of tokens meet", node.name)
    return tuple(result)


def _pointwise(node: Node, layouts: Layouts) -> Layout | Refusal:
    return _meet(node, shape_of(node), node.all_input_nodes, layouts)


def _view(node: Node, layouts: Layouts) -> Layout | Refusal:
    result = regroup(layouts[node.args[0]], shape_of(node))  # type: ignore[index]
    return result if result is not None else Refusal("tokens are split or regrouped", node.name)


def _unflatten(node: Node, layouts: Layouts) -> Layout | Refusal:
    if names(layouts[node.args[0]][node.args[1]]) & RIGID:  # type: ignore[index]
        return Refusal("tokens are split or regrouped", node.name)
    return _view(node, layouts)


def _permutation(node: Node, layouts: Layouts) -> Layout | Refusal:
    layout = list(layouts[node.args[0]])  # type: ignore[index]
    if node.target is aten.transpose.int:
        first, second = node.args[1], node.args[2]
        layout[first], layout[second] = layout[second], layout[first]  # type: ignore[index]
        return tuple(layout)
    return tuple(layout[index] for index in node.args[1])  # type: ignore[union-attr,index]


def _complex(node: Node, layouts: Layouts) -> Layout | Refusal:
    layout = layouts[node.args[0]]  # type: ignore[index]
    return (*layout, named("", 2)) if node.target is aten.view_as_real.default else layout[:-1]


def _expansion(node: Node, layouts: Layouts) -> Layout | Refusal:
    """Only what nobody follows may be repeated."""
    shape, layout = shape_of(node), layouts[node.args[0]]  # type: ignore[index]
    sizes = shape_of(node.args[0])  # type: ignore[arg-type]
    more = len(shape) - len(sizes)
    if more < 0:
        return Refusal("tokens are repeated", node.name)
    layout, sizes = (*[()] * more, *layout), (*[1] * more, *sizes)
    if any(names(dim) and old != new for dim, old, new in zip(layout, sizes, shape, strict=True)):
        return Refusal("tokens are repeated", node.name)
    return _fit(layout, shape)


def _over_channels(first: Callable[[Node, Layout], int]) -> Rule:
    """Rule of an op that mixes the dimensions from ``first`` on, and leaves the others in place."""

    def rule(node: Node, layouts: Layouts) -> Layout | Refusal:
        source = node.args[0]
        layout = layouts[source]  # type: ignore[index]
        if any(argument in layouts for argument in node.all_input_nodes if argument is not source):
            return Refusal("its weights depend on the tokens", node.name)
        if any(names(dim) & RIGID for dim in layout[first(node, layout) :]):
            return Refusal("tokens are mixed", node.name)
        return _fit(layout, shape_of(node))

    return rule


def _linear(node: Node, layouts: Layouts) -> Layout | Refusal:
    mixed = names(layouts[node.args[0]][-1])  # type: ignore[index]
    return Refusal("tokens are mixed", node.name) if mixed else LAST(node, layouts)


def _reduction(argument: int) -> Rule:
    """Rule of an op that reduces the dimensions in its ``argument``, followed by ``keepdim``."""

    def rule(node: Node, layouts: Layouts) -> Layout | Refusal:
        layout = layouts[node.args[0]]  # type: ignore[index]
        given: Any = node.args[argument] if len(node.args) > argument else None
        dims = {int(dim) % len(layout) for dim in given or range(len(layout))}
        keep = len(shape_of(node)) == len(layout)
        if any(names(layout[dim]) & RIGID for dim in dims):
            return Refusal("tokens are mixed", node.name)
        return tuple(() if index in dims else dim for index, dim in enumerate(layout) if keep or index not in dims)

    return rule


def _softmax(node: Node, layouts: Layouts) -> Layout | Refusal:
    layout = layouts[node.args[0]]  # type: ignore[index]
    return Refusal("tokens are mixed", node.name) if names(layout[node.args[1]]) & RIGID else layout  # type: ignore[index]


def _slice(node: Node, layouts: Layouts) -> Layout | Refusal:
    layout, dim = layouts[node.args[0]], cut_dim(node)  # type: ignore[index]
    start, stop, step = slice_range(node)
    part = cut(layout[dim], start, stop) if step == 1 else None
    if not names(layout[dim]):
        part = named("", shape_of(node)[dim])
    if part is None:
        return Refusal("tokens are cut or picked", node.name)
    return (*layout[:dim], part, *layout[dim + 1 :])


def _pick(node: Node, layouts: Layouts) -> Layout | Refusal:
    layout, dim = layouts[node.args[0]], cut_dim(node)  # type: ignore[index]
    if names(layout[dim]):
        return Refusal("tokens are cut or picked", node.name)
    return layout[:dim] + layout[dim + 1 :]


def _split(node: Node, layouts: Layouts) -> Layout | Refusal:
    return layouts[node.args[0]]  # type: ignore[index]


def _item(node: Node, layouts: Layouts) -> Layout | Refusal:
    source: Any = node.args[0]
    layout = layouts[source]
    if source.target not in SPLITS or not names(layout[cut_dim(source)]):
        return _fit(layout, shape_of(node))
    dim = cut_dim(source)
    part = cut(layout[dim], *item_range(node))
    return Refusal("tokens are cut or picked", node.name) if part is None else (*layout[:dim], part, *layout[dim + 1 :])


def _concatenation(node: Node, layouts: Layouts) -> Layout | Refusal:
    given: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    shape, dim = shape_of(node), join_dim(node)
    apart = {part: _but(dim, layouts[part]) for part in given if part in layouts}
    result = _meet(node, shape, given, apart)
    if isinstance(result, Refusal):
        return result
    along = [layouts[part][dim] if part in layouts else () for part in given]
    carrying = [index for index, axes in enumerate(along) if names(axes)]
    joined: Dim = named("", shape[dim])
    if len(carrying) == 1:
        sizes, at = [shape_of(part)[dim] for part in given], carrying[0]
        joined = segment(sum(sizes[:at]), along[at], sum(sizes[at + 1 :]))
    elif len(carrying) == len(given) > 1 and all(axes == along[0] for axes in along):
        joined = (*named("", len(given)), *along[0])
    elif carrying:
        return Refusal("tokens are joined with others", node.name)
    return (*result[:dim], joined, *result[dim + 1 :])


def _but(dim: int, layout: Layout) -> Layout:
    return (*layout[:dim], (), *layout[dim + 1 :])


def _stack(node: Node, layouts: Layouts) -> Layout | Refusal:
    given: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    shape = shape_of(node)
    dim = join_dim(node) if node.target is aten.stack.default else 0  # a padded sequence is batch first
    rest = (*shape[:dim], *shape[dim + 1 :])
    if any(part not in layouts or shape_of(part) != rest for part in given):
        return Refusal("joined with tokens from elsewhere", node.name)
    result = _meet(node, rest, given, layouts)
    return result if isinstance(result, Refusal) else (*result[:dim], named("", shape[dim]), *result[dim:])


def _attention(node: Node, layouts: Layouts) -> Layout | Refusal:
    query, *others = node.all_input_nodes
    if any(TOKENS in names(dim) for other in others for dim in layouts.get(other, ())):
        return Refusal("tokens are mixed", node.name)
    return (*layouts[query][:-1], named("", shape_of(node)[-1]))


def _dropout(node: Node, layouts: Layouts) -> Layout | Refusal:
    return _pointwise(node, layouts) if inactive_dropout(node) else Refusal("dropout is active", node.name)


LAST = _over_channels(lambda node, layout: len(layout) - 1)
NORMALIZED = _over_channels(lambda node, layout: len(layout) - len(node.args[1]))  # type: ignore[arg-type]

RULES: dict[Any, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(PERMUTATIONS, _permutation),
    **dict.fromkeys(CASTS | POINTWISE, _pointwise),
    **dict.fromkeys(SPLITS, _split),
    **dict.fromkeys((aten.select.int, aten.unbind.int), _pick),
    **dict.fromkeys(CONCATENATIONS, _concatenation),
    **dict.fromkeys((aten.stack.default, aten.pad_sequence.default), _stack),
    **dict.fromkeys((aten.expand.default, aten.repeat_interleave.self_int, aten.repeat.default),
                    _expansion),
    **dict.fromkeys((aten.view_as_complex.default, aten.view_as_real.default), _complex),
    aten.slice.Tensor: _slice,
    aten.unflatten.int: _unflatten,
    operator.getitem: _item,
    aten.dropout.default: _dropout,
    aten.mean.dim: _reduction(1),
    aten.sum.dim_IntList: _reduction(1),
    aten.linalg_vector_norm.default: _reduction(2),
    aten.softmax.int: _softmax,
    aten.linear.default: _linear,
    aten.layer_norm.default: NORMALIZED,
    aten.rms_norm.default: NORMALIZED,
    aten.group_norm.default: _over_channels(lambda node, layout: 1),
    SDPA: _attention,
}  # fmt: skip
