"""Nodes again, on fewer tokens: their literal sizes, and what they read from elsewhere, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from bigain_fx.passes.arguments import SPLITS, cut_dim, slice_range
from bigain_fx.passes.axes import BATCH, TOKENS, Dim, Layout, aten, length, names, parts, resize, shape_of
from bigain_fx.passes.errors import RewriteError
from bigain_fx.passes.images import Grids
from bigain_fx.passes.rules import from_elsewhere, lined_up
from bigain_fx.passes.surgery import Surgeon

_SIZED = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default})


class Fewer:
    """Replays nodes on the tokens that a rewrite keeps.

    Args:
        surgeon: emits the nodes.
        layouts: of the nodes to replay and of what they read.
        left: how many tokens there are.
        rep: ``(B, left)`` or ``(1, left)`` int64, the token whose angles, mask and the like each of them takes.
    """

    def __init__(self, surgeon: Surgeon, layouts: Mapping[Node, Layout], left: int, rep: Node) -> None:
        self.surgeon, self.layouts, self.left, self.rep = surgeon, layouts, left, rep

    def replay(self, nodes: Iterable[Node], known: dict[Node, Node]) -> None:
        """Emit ``nodes``, in graph order, each after the node that it stands for.

        ``known`` maps what has fewer tokens already to its replacement; every node emitted is added to it.
        """
        for node in nodes:
            with self.surgeon.after(node):
                self._replay(node, known)

    def _replay(self, node: Node, known: dict[Node, Node]) -> None:
        layout = self.layouts[node]
        others = lined_up(node, layout, self.layouts)
        elsewhere = from_elsewhere(node, layout, self.layouts)
        new = {operand: self.pick(operand, dims, others) for operand, dims in elsewhere.items()} | known
        target, args = self._resized(node)
        args, kwargs = map_arg((args, dict(node.kwargs)), lambda item: new.get(item, item))
        known[node] = self.surgeon.emit(target, args, node, kwargs)
        expected = tuple(length(self._shrunk(dim)) for dim in layout)
        if (shape := shape_of(known[node])) and shape != expected:
            raise RewriteError(
                f"{node.name} has shape {shape} on fewer tokens, not {expected}; please report this model"
            )

    def pick(self, operand: Node, dims: tuple[int, ...], layout: Layout) -> Node:
        """``operand``, lined up with ``layout`` from the last dimension on, at the kept tokens of ``dims``."""

        rows = {}
        for dim in dims:
            before, tokens, after = parts(layout[dim])
            rows[dim] = among_all(self.surgeon, self.rep, before, after, length(tokens))

        def picked() -> Node:
            result = operand
            for dim, index in rows.items():
                result = self._pick_along(result, dim, index, layout)
            return result

        key = (operand, self.rep, dims, tuple(layout[dim] for dim in dims))
        return self.surgeon.once(key, max(operand, *rows.values()), picked)

    def _pick_along(self, operand: Node, dim: int, rows: Node, layout: Layout) -> Node:
        emit = self.surgeon.emit
        samples, count = shape_of(rows)
        batch = next((index - len(layout) for index, axes in enumerate(layout) if BATCH in names(axes)), None)
        if batch is None or samples == 1:
            index = emit(aten.view.default, (rows, [count]), like=operand)
            return emit(aten.index_select.default, (operand, dim, index), like=operand)
        shape = [1] * (-batch - len(shape_of(operand))) + list(shape_of(operand))
        shape[batch] = samples
        if tuple(shape) != shape_of(operand):
            operand = emit(aten.expand.default, (operand, shape), like=operand)
        shape[dim] = count
        apart = [size if index - len(shape) in (batch, dim) else 1 for index, size in enumerate(shape)]
        rows = rows if batch < dim else emit(aten.transpose.int, (rows, 0, 1), like=operand)
        index = emit(aten.reshape.default, (rows, apart), like=operand)
        index = emit(aten.expand.default, (index, shape), like=operand)
        return emit(aten.gather.default, (operand, dim, index), like=operand)

    def _resized(self, node: Node) -> tuple[Any, tuple[Any, ...]]:
        """Target and arguments of ``node`` with the literal sizes and bounds of fewer tokens."""
        args: tuple[Any, ...] = node.args
        if node.target in _SIZED:
            sizes = [
                length(self._shrunk(dim)) if TOKENS in names(dim) and size != -1 else size
                for size, dim in zip(args[1], self.layouts[node], strict=True)
            ]
            return node.target, (args[0], sizes, *args[2:])
        if node.target is aten.slice.Tensor or node.target in SPLITS:
            dim = cut_dim(node)
            along = self.layouts[args[0]][dim]
            if TOKENS in names(along):
                if node.target is aten.slice.Tensor:
                    start, stop, _ = slice_range(node)
                    return node.target, (args[0], dim, self._moved(along, start), self._moved(along, stop))
                ends = [0]
                for part in node.meta["val"]:
                    ends.append(ends[-1] + part.shape[dim])
                ends = [self._moved(along, end) for end in ends]
                sizes = [stop - start for start, stop in pairwise(ends)]
                return aten.split_with_sizes.default, (args[0], sizes, dim)
        return node.target, args

    def _shrunk(self, dim: Dim) -> Dim:
        return resize(dim, {TOKENS: self.left})

    def _moved(self, dim: Dim, position: int) -> int:
        """Where the bound ``position``, which cuts no image, lies among fewer tokens."""
        before, inner, _ = parts(dim)
        if position <= before:
            return position
        if position >= before + length(inner):
            return position - length(inner) + length(self._shrunk(inner))
        return position * length(self._shrunk(dim)) // length(dim)


def image_rows(surgeon: Surgeon, whole: Node, before: int, after: int) -> Node:
    """What lies between the first ``before`` and the last ``after`` rows of ``whole (B, rows, C)``."""
    if not before and not after:
        return whole
    return surgeon.emit(aten.slice.Tensor, (whole, 1, before, shape_of(whole)[1] - after), like=whole)


def rows_of_each(surgeon: Surgeon, image: Node, grids: Grids) -> list[Node]:
    """The rows of each image of ``image (B, tokens, C)``."""
    ends = [0, *accumulate(map(math.prod, grids))]
    if len(grids) == 1:
        return [image]
    return [surgeon.emit(aten.slice.Tensor, (image, 1, *bounds), like=image) for bounds in pairwise(ends)]


def one_behind_another(surgeon: Surgeon, each: Sequence[Node], dim: int, sizes: Sequence[int] = ()) -> Node:
    """What was worked out for each image, for all of them; an index into ``sizes`` members of one image is shifted."""
    if len(each) == 1:
        return each[0]
    starts = [0, *accumulate(sizes)][: len(each)] if sizes else [0] * len(each)
    shifted = [
        surgeon.emit(aten.add.Tensor, (part, start), like=part) if start else part
        for part, start in zip(each, starts, strict=True)
    ]
    return surgeon.emit(aten.cat.default, (shifted, dim), like=each[0])


def among_all(surgeon: Surgeon, index: Node, before: int, after: int, members: int) -> Node:
    """``index (B, n)`` into ``members`` image rows as one into all rows, where those beside them stand for themselves.

    Text is thus a group, or a kept token, of its own: nothing needs to be cut apart and put together again.
    """
    if not before and not after:
        return index

    def others(start: int, count: int) -> list[Node]:
        samples = shape_of(index)[0]
        rows = torch.arange(start, start + count).repeat(samples, 1)
        return [surgeon.constant(f"bigain_rows_{samples}_{start}_{count}", rows, like=index)] if count else []

    def shifted() -> Node:
        image = surgeon.emit(aten.add.Tensor, (index, before), like=index) if before else index
        parted = [*others(0, before), image, *others(before + members, after)]
        return surgeon.emit(aten.cat.default, (parted, 1), like=index)

    return surgeon.once((index, before, after, members), index, shifted)
