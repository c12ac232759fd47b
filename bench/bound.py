"""The free bound: the rewritten graph in which deciding, merging and averaging cost nothing.

::

    assign, rep = merge_plan(metric)           (gone)
    merge(x, assign, M)                 ->     x[:, :M]
    unmerge(y, assign)                         tile(y)[:, :N]
    kv_downsample(x, alpha, (h, w), s)         x as (h, w)[s // 2 :: s, s // 2 :: s]

All shapes stay as they are, so everything else costs what it costs in the method's own graph. The values mean nothing:
a bound is for timing only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from bigain_fx import families
from bigain_fx.bench import BenchError
from bigain_fx.calls import CallBinder, flat_tensors
from bigain_fx.passes.axes import shape_of
from bigain_fx.passes.flops import flops
from bigain_fx.passes.methods import KVDownsample, Methods, ToDo
from bigain_fx.passes.ops import PLANS
from bigain_fx.passes.surgery import Surgeon
from bigain_fx.passes.where import where_text
from bigain_fx.prepare import trace
from bigain_fx.settings import Settings

if TYPE_CHECKING:
    from bigain_fx.models import Workload

aten, bigain = torch.ops.aten, torch.ops.bigain


@dataclass(frozen=True)
class Bound:
    """A bound, ready to be called; ``flops`` are those of its ``graph``, ``sites`` its rewritten attentions."""

    call: Callable[[], Any]
    graph: GraphModule
    flops: int
    sites: int


def bound_name(methods: Methods) -> str | None:
    """Name of the bound of ``methods``, such as ``"bound:merge:0.7"``; None where they change nothing.

    Methods of one name have one bound: what decides its cost is how many tokens are left and where, not which.
    """
    parts = []
    for method in methods:
        if method.idle:
            continue
        if isinstance(method, KVDownsample | ToDo):
            part = f"kv:{method.factor}"
        else:
            ratio = "/".join(f"{ratio:g}" for ratio in method.ratios)
            part = f"merge:{ratio}" + (f":cell={method.cell[0]}x{method.cell[1]}" * (method.cell != (2, 2)))
            part += f":{method.scope}" * (method.scope != "attention")
        part += f":levels={method.levels or 'all'}" * (method.levels != 1)
        parts.append(part + (f":where={where_text(method.where)}" if method.where is not None else ""))
    return "bound:" + "+".join(parts) if parts else None


def build(workload: Workload, methods: Methods, *, backend: str = "inductor", mode: str | None = None) -> Bound:
    """Capture ``workload``, rewrite it with ``methods``, make that free, and compile it as ``optimize`` does.

    Raises:
        BigainError: whatever :func:`bigain_fx.optimize` raises for the same arguments.
    """
    arguments, _ = CallBinder(workload.model).bind(workload.args, workload.kwargs)
    settings, grid = Settings(backend, mode=mode), families.GridReader()(arguments)
    resolved = families.resolve(methods, workload.model)
    captured, rewritten = trace(
        workload.model, resolved, settings, arguments, families.grid_for(None, arguments, grid).grid
    )
    module = free(rewritten.module)
    free_flops = flops(module.graph.nodes)
    run, inputs = settings.compile(module), flat_tensors(arguments)

    def call() -> Any:
        with torch.no_grad():
            return pytree.tree_unflatten(run(*inputs), captured.out_spec)

    return Bound(call, module, free_flops, sum(record.action != "kept" for record in rewritten.records))


def free(module: GraphModule) -> GraphModule:
    """Replace the operators of a rewritten graph, in place, by constant slices and a tile, and drop its plans.

    Raises:
        BenchError: something other than merging reads a plan, which then cannot be dropped.
    """
    surgeon = Surgeon(module)
    for node in list(module.graph.nodes):
        replace = _FREE.get(node.target)
        if replace is not None:
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(replace(surgeon, node, *node.args))
            module.graph.erase_node(node)
        elif node.target in PLANS:
            _fix_representatives(surgeon, node)
    surgeon.finish()
    for node in module.graph.nodes:
        if node.target in PLANS:
            readers = ", ".join(sorted(str(user) for item in node.users for user in item.users))
            raise BenchError(f"the plan {node} is also read by {readers}: there is no free bound of this graph")
    return module


def _fix_representatives(surgeon: Surgeon, plan: Node) -> None:
    """Let rotary angles and masks take the first M tokens: the gather stays, what decided it goes."""
    for item in [user for user in plan.users if user.args[1] == 1 and user.users]:
        batch, groups = shape_of(item)
        first = torch.arange(groups).expand(batch, groups).contiguous()
        with surgeon.after(item):
            item.replace_all_uses_with(surgeon.constant(f"bigain_first_{batch}x{groups}", first, like=item))


def _slice(surgeon: Surgeon, node: Node, x: Node, assign: Node, groups: int) -> Node:
    """The first M tokens, contiguous as merged tokens are; inductor computes only these where ``x`` is element-wise."""
    first = surgeon.emit(aten.slice.Tensor, (x, 1, 0, groups), like=node)
    return surgeon.emit(aten.contiguous.default, (first,), like=node)


def _tile(surgeon: Surgeon, node: Node, y: Node, index: Node, weight: Node | None = None) -> Node:
    """The M tokens over and over, up to the N of ``index (..., N)``.

    Inductor reads a repeat in place, at ``index % M``, inside the kernel of the residual add; a concatenation would be
    written out first.
    """
    tokens, groups = shape_of(index)[-1], shape_of(y)[1]
    tiled = surgeon.emit(aten.repeat.default, (y, [1, math.ceil(tokens / groups), 1]), like=node)
    whole = surgeon.emit(aten.slice.Tensor, (tiled, 1, 0, tokens), like=node)
    return surgeon.emit(aten.contiguous.default, (whole,), like=node)


def _stride(surgeon: Surgeon, node: Node, x: Node, alpha: float | Node, grid: tuple[int, int], s: int) -> Node:
    """One token of each block: the nearest, or at the offset of the last where a block cut off at the edge ends."""
    batch, _, channels = shape_of(x)
    taken = surgeon.emit(aten.reshape.default, (x, [batch, *grid, channels]), like=node)
    for dim, side in enumerate(grid, 1):
        taken = surgeon.emit(aten.slice.Tensor, (taken, dim, min(s // 2, (side - 1) % s), side, s), like=node)
    return surgeon.emit(aten.reshape.default, (taken, list(shape_of(node))), like=node)


def _ones(surgeon: Surgeon, node: Node, assign: Node, groups: int) -> Node:
    """Every group as one token."""
    size = [shape_of(assign)[0], groups]
    return surgeon.constant(f"bigain_ones_{size[0]}x{size[1]}", torch.ones(size), like=node)


_FREE: dict[Any, Callable[..., Node]] = {
    bigain.merge.default: _slice,
    bigain.group_sizes.default: _ones,
    bigain.unmerge.default: _tile,
    bigain.blend.default: _tile,
    bigain.kv_downsample.default: _stride,
    bigain.kv_downsample.Tensor: _stride,
}
