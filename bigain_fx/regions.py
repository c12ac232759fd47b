"""How a rewritten graph is compiled: what repeats is compiled once for each shape, and never from an older cache.

Inductor writes code node by node: the plan's thirteen kernels, and the smaller projections and attention, at each of
SDXL's seventy attentions. What ``torch.compiler.nested_compile_region`` marks is written once, and called.
"""

from __future__ import annotations

import hashlib
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bigain_fx.passes import ops
from bigain_fx.passes.axes import aten
from bigain_fx.passes.destinations import RULES, Destinations
from bigain_fx.passes.memory import roots, shown_by, written
from bigain_fx.passes.ops import DECIDING
from bigain_fx.passes.ops.kernels import switched_on
from bigain_fx.passes.surgery import BRANCH


def as_regions(module: GraphModule) -> None:
    """Call plans and branches on merged tokens, in place, through functions that torch compiles once for each shape."""
    branches: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        if name := node.meta.get(BRANCH):
            branches.setdefault(name, []).append(node)
    groups = [_with_own_inputs(nodes) for nodes in branches.values()]
    groups += [[node] for node in module.graph.nodes if node.target in DECIDING]
    regions: dict[str, Callable[..., Any]] = {}
    for nodes in groups:
        _call_as_region(module, nodes, regions)
    module.graph.lint()
    module.recompile()


@contextmanager
def own_cache() -> Iterator[None]:
    """Cache what is compiled meanwhile under our operators' source and switch too: torch's key has only their names."""
    config: Any = torch.compiler.config
    kernels = "".join(f" kernels-{device}" for device in ("cpu", "cuda") if switched_on(device))
    with config.patch(cache_key_tag=f"{config.cache_key_tag} bigain-fx {_source()}{kernels}"):
        yield


def _source() -> str:
    """A digest of the operators and of every destination rule that is known."""
    files = sorted(Path(ops.__file__).parent.glob("*.py"))
    rules = [rule for _, rule in sorted(RULES.items())]
    return hashlib.sha256(b"".join([*(file.read_bytes() for file in files), *map(_written, rules)])).hexdigest()


def _written(rule: type[Destinations]) -> bytes:
    """What ``rule`` does: the file it is in, or in a notebook its bytecode."""
    file, code = getattr(sys.modules.get(rule.__module__), "__file__", None), rule.positions.__code__
    return Path(file).read_bytes() if file else repr((code.co_code, code.co_names)).encode()


def _with_own_inputs(nodes: Sequence[Node]) -> list[Node]:
    """``nodes`` with what a rewrite emitted for them alone (positions, angles, fewer keys), in graph order."""
    found, pending = set(nodes), list(nodes)
    while pending:
        for source in pending.pop().all_input_nodes:
            free = source.meta.get(BRANCH) == "" and source.target not in DECIDING
            if free and source not in found and all(user in found for user in source.users):
                found.add(source)
                pending.append(source)
    # What is taken from a result that stays outside stays there with it: regions take tensors.
    return sorted(node for node in found if node.target is not operator.getitem or node.args[0] in found)


def _with_offsets_outside(graph: Graph, nodes: Sequence[Node]) -> list[Node]:
    """``nodes``, but what is read elsewhere and begins inside another's memory is taken once more there.

    Inductor counts the offset of a view that a region returns twice (torch 2.11 to 2.13), and reads beyond its memory.
    """
    inside = dict.fromkeys(nodes)
    for node in reversed(nodes):
        if _begins_inside(node) and any(user not in inside for user in node.users):
            with graph.inserting_after(node):
                again = graph.node_copy(node, lambda source: source)
            node.replace_all_uses_with(again, lambda user: user not in inside)
            if not node.users:
                graph.erase_node(node)
                del inside[node]
    return list(inside)


def _begins_inside(node: Node) -> bool:
    """Whether ``node``, or one of several results, is a view that begins inside the memory of what it is a view of."""
    if node.target is aten.clone.default:  # inductor leaves it out where it keeps the strides
        return _begins_inside(node.args[0])  # type: ignore[arg-type]
    if not shown_by(node) or written(node):
        return False
    results = pytree.tree_leaves(node.meta["val"])
    return any(isinstance(each, Tensor) and each.storage_offset() for each in results)


def _call_as_region(module: GraphModule, nodes: Sequence[Node], regions: dict[str, Callable[..., Any]]) -> None:
    """Put one call in the place of ``nodes``.

    They stay where something between them changes memory, or needs some of them and feeds others; and where inputs or
    outputs may share memory, or weights are tensor subclasses or layers called as they are (quantized): torch has no
    such regions.
    """
    graph = module.graph
    nodes = _with_offsets_outside(graph, sorted(nodes))  # an earlier call may have moved some
    inside, later = set(nodes), dict[Node, None]()
    node, last = nodes[0], nodes[-1]
    if any(each.op == "call_module" for each in nodes):
        return
    while node is not last:
        if written(node):
            return
        node = node.next
        if node not in inside and any(source in inside or source in later for source in node.all_input_nodes):
            later[node] = None
    inputs, outputs = boundary(nodes)
    weights = [operator.attrgetter(str(node.target))(module) for node in inputs if node.op == "get_attr"]
    values = [*weights, *pytree.tree_leaves([node.meta["val"] for node in inputs])]
    if any(source in later for source in inputs) or any(map(is_traceable_wrapper_subclass, values)):
        return
    memory = [root for node in (*inputs, *outputs) for root in roots(node)]
    storages = [weight.untyped_storage()._cdata for weight in weights]
    if len(set(memory)) < len(memory) or len(set(storages)) < len(storages):
        return
    key = described(nodes, inputs, outputs)
    if key not in regions:
        regions[key] = _region(nodes, inputs, outputs)
    with graph.inserting_after(last):
        call = graph.call_function(regions[key], tuple(inputs))
    for node in reversed(later):
        call.append(node)
    with graph.inserting_after(call):
        results = [graph.call_function(operator.getitem, (call, index)) for index in range(len(outputs))]
    for output, result in zip(outputs, results, strict=True):
        output.replace_all_uses_with(result, lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)


def boundary(nodes: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """What ``nodes`` read from outside, and which of them are read there."""
    inside = set(nodes)
    inputs = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    return list(inputs), [node for node in nodes if any(user not in inside for user in node.users)]


def described(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> str:
    """What two groups of nodes share that do the same to inputs of the same kinds."""
    index = {node: f"%{position}" for position, node in enumerate([*inputs, *nodes])}
    leaves = pytree.tree_leaves([node.meta["val"] for node in inputs])
    kinds = [
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]
    calls = [(node.target, map_arg((node.args, node.kwargs), index.__getitem__)) for node in nodes]
    return str((kinds, calls, [index[node] for node in outputs]))


def as_function(
    nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node], root: nn.Module | None = None
) -> GraphModule:
    """``nodes`` as a module: ``outputs``, as a tuple, of ``inputs``; ``root`` has the layers that they call."""
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node, copied in copies.items():
        copied.meta["val"] = node.meta["val"]
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return GraphModule(root or nn.Module(), graph)


def _region(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> Callable[..., Any]:
    """``nodes`` as a function of their inputs, marked for torch."""
    # Torch knows a region by its code object: this one has its operators and literals in it, a closure would not.
    marked: Callable[..., Any] = torch.compiler.nested_compile_region(as_function(nodes, inputs, outputs))
    marked.__module__, marked.__name__ = __name__, "region"  # what the graph's code calls it
    return marked
