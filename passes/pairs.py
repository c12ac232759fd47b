"""Rewrite: complex numbers as their real and imaginary parts, for what takes graphs and knows no complex numbers.

::

    z = view_as_complex(x)                     a, b = select(x, -1, 0), select(x, -1, 1)
    w = mul(z, gather(table, rep))      ->     p, q = gather(real, rep), gather(imaginary, rep)
    y = view_as_real(w)                        y = stack([a * p - b * q, a * q + b * p], -1)

What moves, joins or adds numbers does the same to each part. What depends on no input, such as a table of rotary
angles, is computed here, whatever that takes, and becomes buffers. A complex input becomes a real one of pairs.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from bigain_fx.passes.arguments import CASTS, CONCATENATIONS, SPLITS, VIEWS
from bigain_fx.passes.axes import aten
from bigain_fx.passes.constants import folded
from bigain_fx.passes.errors import ExportError
from bigain_fx.passes.memory import written_by
from bigain_fx.passes.sites import module_name
from bigain_fx.passes.surgery import Surgeon

Parts = tuple[Any, Any]
"""Real and imaginary part of a node or a number; parts of several results are nodes of several results."""
_EACH = SPLITS | CONCATENATIONS | CASTS | VIEWS | {
    aten.stack.default, aten.pad_sequence.default, aten.constant_pad_nd.default, aten.repeat.default,
    aten.repeat_interleave.self_int, aten.gather.default, aten.index.Tensor, aten.index_select.default,
    aten.flip.default, aten.roll.default, aten.where.self, aten.masked_fill.Scalar, aten.neg.default,
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sum.dim_IntList, aten.mean.dim,
}  # fmt: skip
"""What does the same to the real and to the imaginary part, beside views."""
_VALUES = ("Tensor", "number", "float")
"""Types of arguments of which a number is a value, as a size or a dimension is not."""
_NO_VALUES = frozenset({"index", "indices", "mask", "condition", "alpha"})
"""Arguments of those that choose or weigh, so that both parts take them as they are."""


def pair(tensor: Tensor) -> Tensor:
    """``(...)`` complex as ``(..., 2)`` real, which is how a graph takes it that :func:`as_pairs` made."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_pairs(module: GraphModule) -> GraphModule:
    """Return ``module`` without complex numbers: a new graph if it has any, whose weights are shared.

    Args:
        module: a pre-dispatch ATen graph whose nodes carry ``meta["val"]``.

    Returns:
        A graph of the same inputs and outputs, where a complex input is the real one that :func:`pair` makes of it.

    Raises:
        ExportError: an operator on complex numbers without a form in real ones, or a complex output.
    """
    if not any(map(_is_complex, module.graph.nodes)):
        return module
    module = folded(module, _is_complex)
    result = GraphModule(module, copy.deepcopy(module.graph))
    _Rewriter(Surgeon(result)).run()
    return GraphModule(result, result.graph)  # leaves the complex tables behind


class _Rewriter:
    """Makes the parts of each complex value, in the order of the graph."""

    def __init__(self, surgeon: Surgeon) -> None:
        self._surgeon = surgeon
        surgeon.clean()
        self._complex = {node for node in surgeon.graph.nodes if _is_complex(node)}
        self._parts: dict[Node, Parts] = {}

    def run(self) -> None:
        """Rewrite the graph, and drop what was complex."""
        for node in list(self._surgeon.graph.nodes):
            if node not in self._complex and not self._complex.intersection(node.all_input_nodes):
                continue
            if written_by(node):  # parts may be copies
                raise _refusal(node, " in memory that is written to")
            with self._surgeon.after(node):
                if node in self._complex:
                    self._parts[node] = self._checked(node, self._parts_of(node))
                else:
                    node.replace_all_uses_with(self._real(node))
        self._surgeon.finish()

    def _parts_of(self, node: Node) -> Parts:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self._surgeon.module).detach()
            return self._buffer(node, "real", value.real), self._buffer(node, "imaginary", value.imag)
        if node.op == "placeholder":
            node.meta["val"] = pair(node.meta["val"])
            return self.split(node, node)
        if node.target is operator.getitem:
            real, imaginary = self._parts[node.args[0]]  # type: ignore[index]
            return self._surgeon.item(real, node.args[1]), self._surgeon.item(imaginary, node.args[1])  # type: ignore
        if rule := _RULES.get(node.target):
            return rule(self, node)
        if node.target in _EACH or (isinstance(node.target, OpOverload) and node.target.is_view):
            return self._each(node, 0), self._each(node, 1)
        raise _refusal(node)

    def _real(self, node: Node) -> Node:
        """The real value of ``node``, from a complex one."""
        if rule := _REAL.get(node.target):
            return rule(self, node)
        if node.target in CASTS:
            return self._each(node, 0)
        raise _refusal(node)

    def _each(self, node: Node, part: int) -> Node:
        """``node`` of one part of its values: 0 the real, 1 the imaginary one."""
        assert isinstance(node.target, OpOverload)
        schema = {argument.name: str(argument.type) for argument in node.target._schema.arguments}

        def take(name: str, value: Any) -> Any:
            if name in _NO_VALUES:
                return value
            if isinstance(value, int | float | complex) and any(kind in schema[name] for kind in _VALUES):
                return self._part(value, part, node)
            if isinstance(value, torch.dtype):
                return value.to_real()
            return map_arg(value, lambda item: self._part(item, part, node))

        args = tuple(take(name, value) for name, value in zip(schema, node.args, strict=False))
        return self.emit(node, node.target, *args, **{name: take(name, value) for name, value in node.kwargs.items()})

    def _part(self, value: Any, part: int, like: Node) -> Any:
        if value in self._complex:
            return self._parts[value][part]
        if not isinstance(value, Node):
            return complex(value).imag if part else complex(value).real
        return self.emit(like, aten.zeros_like.default, value) if part else value

    def split(self, like: Node, pairs: Any) -> Parts:
        """The parts of the complex numbers that ``pairs (..., 2)`` holds, as views of it."""
        real, imaginary = (self.emit(like, aten.select.int, pairs, -1, part) for part in (0, 1))
        return real, imaginary

    def both(self, value: Any) -> Parts:
        """The parts of an operand; the second of a real one is None."""
        if isinstance(value, complex):
            return value.real, value.imag
        return self._parts[value] if value in self._complex else (value, None)

    def _buffer(self, node: Node, part: str, value: Tensor) -> Node:
        return self._surgeon.constant(f"bigain_{node.name}_{part}", value.contiguous(), node)

    def emit(self, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self._surgeon.emit(target, args, like, kwargs)

    def _checked(self, node: Node, parts: Parts) -> Parts:
        """``parts``, if they are real and of the shape of ``node``."""
        value = torch.view_as_complex(node.meta["val"]) if node.op == "placeholder" else node.meta["val"]
        wanted = [(tensor.shape, tensor.dtype.to_real()) for tensor in _tensors(value)]
        if any([(tensor.shape, tensor.dtype) for tensor in _tensors(part.meta["val"])] != wanted for part in parts):
            raise _refusal(node)
        return parts


def _product(rewriter: _Rewriter, node: Node) -> Parts:
    (a, b), (p, q) = map(rewriter.both, node.args)
    emit = partial(rewriter.emit, node)
    if b is None or q is None:  # one is real
        factor, parts = (a, (p, q)) if b is None else (p, (a, b))
        real, imaginary = (emit(aten.mul.Tensor, part, factor) for part in parts)
        return real, imaginary
    ap, bq, aq, bp = (emit(aten.mul.Tensor, *pair) for pair in ((a, p), (b, q), (a, q), (b, p)))
    return emit(aten.sub.Tensor, ap, bq), emit(aten.add.Tensor, aq, bp)


def _quotient(rewriter: _Rewriter, node: Node) -> Parts:
    (a, b), (p, q) = map(rewriter.both, node.args)
    if b is None or q is not None or len(node.args) > 2 or node.kwargs:
        raise _refusal(node)
    return rewriter.emit(node, aten.div.Tensor, a, p), rewriter.emit(node, aten.div.Tensor, b, p)


def _conjugate(rewriter: _Rewriter, node: Node) -> Parts:
    real, imaginary = rewriter.both(node.args[0])
    return real, rewriter.emit(node, aten.neg.default, imaginary)


def _polar(rewriter: _Rewriter, node: Node) -> Parts:
    length, angle = node.args
    turned = (rewriter.emit(node, turn, angle) for turn in (aten.cos.default, aten.sin.default))
    real, imaginary = (rewriter.emit(node, aten.mul.Tensor, length, each) for each in turned)
    return real, imaginary


_CONJUGATES = (aten._conj.default, aten.conj.default, aten.conj_physical.default)
_RULES: Mapping[Any, Callable[[_Rewriter, Node], Parts]] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _quotient),
    **dict.fromkeys(_CONJUGATES, _conjugate),
    aten.resolve_conj.default: lambda rewriter, node: rewriter.both(node.args[0]),
    aten.view_as_complex.default: lambda rewriter, node: rewriter.split(node, node.args[0]),
    aten.complex.default: lambda rewriter, node: (node.args[0], node.args[1]),
    aten.polar.default: _polar,
}
"""How a complex value is made of parts."""
_REAL: Mapping[Any, Callable[[_Rewriter, Node], Node]] = {
    aten.real.default: lambda rewriter, node: rewriter.both(node.args[0])[0],
    aten.imag.default: lambda rewriter, node: rewriter.both(node.args[0])[1],
    aten.view_as_real.default: lambda rewriter, node: rewriter.emit(
        node, aten.stack.default, list(rewriter.both(node.args[0])), -1
    ),
}
"""How a real value is made of the parts of a complex one."""


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_complex(node: Node) -> bool:
    return any(tensor.is_complex() for tensor in _tensors(node.meta.get("val")))


def _refusal(node: Node, why: str = "") -> ExportError:
    what = "an output" if node.op == "output" else node.target
    return ExportError(f"{module_name(node)}: {what} of complex numbers{why} has no form in real ones to export")
