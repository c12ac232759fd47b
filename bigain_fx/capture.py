"""Capture of a denoiser as one flat pre-dispatch ATen graph, which leaves the denoiser as it was."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from bigain_fx.blocks import advice
from bigain_fx.hooks import traced_casts
from bigain_fx.model_state import ModelState, clear_caches
from bigain_fx.passes.axes import aten
from bigain_fx.passes.errors import CaptureError, first_line
from bigain_fx.passes.memory import roots, written
from bigain_fx.quantized import plain_layers, put_back, with_layer
from bigain_fx.torch_internals import one_at_a_time


@dataclass(frozen=True)
class Captured:
    """One graph of a denoiser for one input signature.

    Attributes:
        module: takes the flat tensor inputs in order, returns the flat outputs; its parameters are the model's own.
        out_spec: the pytree of the model's output, its output class included.
        numbers: paths of the float attributes that are inputs too, behind the others.
    """

    module: GraphModule
    out_spec: pytree.TreeSpec
    numbers: tuple[str, ...] = ()


def capture(model: nn.Module, arguments: Mapping[str, Any], numbers: Mapping[str, Tensor] | None = None) -> Captured:
    """Capture ``model(**arguments)`` with ``torch.export``: pre-dispatch ATen, static shapes, weights shared.

    Args:
        model: a denoiser in eval mode.
        arguments: canonical keyword arguments, as :meth:`CallBinder.bind` returns them.
        numbers: by path, float attributes of the model that become inputs, as 0-d tensors that hold their values.

    Whatever happens, ``model`` is afterwards as it was before, or as a first call leaves it: some fill in a table then.
    One thread captures at a time; meanwhile no other may run ``model`` itself.

    Raises:
        CaptureError: ``torch.export`` cannot capture it (its error is chained), forward writes into a plain tensor, or
            it changes an attribute at every call.
    """
    with one_at_a_time():
        before = ModelState(model)
        program, module, changed = _exported(model, arguments, before, numbers or {})
        if not changed:
            _check_static(module.graph, model)
        _check_writes(module.graph, model)
        if changed:
            program, module = _exported_after_a_call(model, arguments, before, numbers or {})
    out_spec = program.call_spec.out_spec
    _check_static(module.graph, model)
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, (path, leaf) in zip(inputs, leaves, strict=True):
        node.meta["argument"] = pytree.keystr(path[:1])
        if not isinstance(leaf, Tensor):
            node.replace_all_uses_with(leaf)
            module.graph.erase_node(node)
    module.graph.set_codegen(CodeGen())
    read = _as_inputs(module, numbers or {})
    # A fresh module leaves behind the input checks that export hangs on its own.
    return Captured(GraphModule(module, module.graph), out_spec, read)


def value_read(graph: Graph) -> str | None:
    """Return the first tensor whose value ``graph`` takes out, as a number, by name."""
    for target in (aten._local_scalar_dense.default, aten.item.default):
        for node in graph.find_nodes(op="call_function", target=target):
            return str(node.args[0])
    return None


def _as_inputs(module: GraphModule, numbers: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Make inputs of the constants that are ``numbers``; return the paths of those that there are."""
    if not numbers:
        return ()
    graph = module.graph
    path_of = {tensor.data_ptr(): path for path, tensor in numbers.items()}
    made: dict[str, Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(module)
        path = path_of.get(value.data_ptr()) if isinstance(value, Tensor) and not value.is_meta else None
        if path is None:
            continue
        if path not in made:
            last = [each for each in graph.nodes if each.op == "placeholder"][-1]
            with graph.inserting_after(last):
                made[path] = graph.placeholder(f"number_{len(made)}")
            made[path].meta = {"val": node.meta["val"], "argument": ""}
        node.replace_all_uses_with(made[path])
        graph.erase_node(node)
    return tuple(made)


def _exported(
    model: nn.Module, arguments: Mapping[str, Any], state: ModelState, numbers: Mapping[str, Tensor]
) -> tuple[ExportedProgram, GraphModule, list[str]]:
    """Export ``model``, which is in ``state`` and stays so; return what the export changed in it, too."""
    try:
        for path, tensor in numbers.items():
            container, name = state.place(path) or ({}, path)
            container[name] = tensor
        with torch.no_grad(), traced_casts(model), plain_layers(model) as quantized:
            program = torch.export.export(model, (), _told_apart(arguments, state.tensors), strict=False)
            module = program.module(check_guards=False)
    except Exception as error:
        reason = f"torch.export cannot capture {type(model).__name__}: {first_line(error)}"
        named = with_layer(reason, model)
        raise CaptureError(named + advice(model, error) if named == reason else named) from error
    finally:
        changed = [path for path in state.restore() if path not in numbers]
        clear_caches(model)
    assert isinstance(module, GraphModule)
    put_back(module, quantized)
    return program, module, changed


def _told_apart(arguments: Mapping[str, Any], tensors: Iterable[Tensor]) -> dict[str, Any]:
    """``arguments`` with a tensor object for each: what is given twice, or is a weight, would become one input."""
    met = set(map(id, tensors))

    def apart(tensor: Tensor) -> Tensor:
        known = id(tensor) in met
        met.add(id(tensor))
        return tensor.detach() if known else tensor

    return pytree.tree_map_only(Tensor, apart, dict(arguments))  # type: ignore[no-any-return]


def _exported_after_a_call(
    model: nn.Module, arguments: Mapping[str, Any], before: ModelState, numbers: Mapping[str, Tensor]
) -> tuple[ExportedProgram, GraphModule]:
    """Export ``model`` once a real call has filled in what it keeps for later ones, such as rotary tables."""
    name = type(model).__name__
    try:
        with torch.no_grad():
            model(**arguments)
        program, module, changed = _exported(model, arguments, ModelState(model), numbers)
        if changed:
            raise CaptureError(
                f"{name} cannot be captured: {changed[0]} changes at every call, and a graph would change it once"
            )
    except BaseException as error:
        before.restore()
        if isinstance(error, CaptureError) or not isinstance(error, Exception):
            raise
        raise CaptureError(f"{name} cannot be called: {first_line(error)}") from error
    return program, module


def _check_static(graph: Graph, model: nn.Module) -> None:
    """Refuse a graph of which a shape depends on the values of inputs, or that holds what no graph can run."""
    name = type(model).__name__
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            raise CaptureError(
                f"{name} cannot be captured: the shape of {node.name} depends on the values of its inputs"
                + advice(model, node)
            )
        if node.op == "call_function" and not isinstance(node.target, OpOverload | HigherOrderOperator):
            home = getattr(node.target, "__module__", None) or ""
            if home not in ("_operator", "math", "torch"):
                raise CaptureError(
                    f"{name} cannot be captured: torch.export left a call of {node.target} in the graph"
                    + advice(model, node)
                )

    if any(isinstance(leaf, str) for leaf in pytree.tree_leaves(graph.output_node().args)):
        raise CaptureError(f"{name} cannot be captured: it returns names where tensors belong; optimize its parts")


def _check_writes(graph: Graph, model: nn.Module) -> None:
    """Refuse a graph that writes into a tensor of ``model`` that is no weight."""
    if written := _constant_written(graph, model):
        raise CaptureError(
            f"forward of {type(model).__name__} writes into a tensor that is no buffer ({written}), and a graph cannot "
            "tell whether that lasts; for the scale of a LoRA, call set_adapters() instead"
        )


def _constant_written(graph: Graph, model: nn.Module) -> str | None:
    """The first operator that writes into a constant of ``graph`` that is no weight of ``model``, by name."""
    weights = {name for name, _ in (*model.named_parameters(), *model.named_buffers(remove_duplicate=False))}
    for node in graph.nodes:
        for base in [root for target in written(node) for root in roots(target)]:
            if base.op == "get_attr" and base.target not in weights and "val" in base.meta:  # no body of a context
                return f"{node.target}, {base.target}"
    return None


def renew(graph: GraphModule, buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Let ``graph`` read other buffers, given as ``(old, new)``, of the same dtypes, devices and shapes."""
    new_of = {id(old): new for old, new in buffers}
    if new_of:
        for module in graph.modules():
            for name, tensor in module._buffers.items():
                module._buffers[name] = new_of.get(id(tensor), tensor)
