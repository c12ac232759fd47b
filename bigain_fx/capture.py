"""Calls to a denoiser, and their capture as one flat pre-dispatch ATen graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from bigain_fx.families import attention_backend
from bigain_fx.model_state import ModelState, clear_caches, constant_key
from bigain_fx.passes import checks
from bigain_fx.passes.axes import aten
from bigain_fx.passes.errors import CaptureError, InputError, first_line
from bigain_fx.passes.images import Hint
from bigain_fx.passes.kv import TIMESTEP_INPUTS
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


class CallBinder:
    """Brings every way of calling a denoiser to one form: keyword arguments that differ from their defaults."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.signature = model, inspect.signature(model.forward)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return the canonical keyword arguments, and whether the caller wants the output class.

        Raises:
            InputError: arguments that ``forward`` does not take.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(self.signature.parameters)
            raise InputError(f"the denoiser cannot be called so: {error}; its arguments are {names}") from None
        arguments: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            parameter = self.signature.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(value)
            elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                kind = type(value).__name__
                raise InputError(f"{name} (a {kind}) can only be given by position; a denoiser's inputs need names")
            elif not _is_default(value, parameter.default):
                arguments[name] = plain_number(value)
        wants_class = True
        if option := self.signature.parameters.get("return_dict"):
            wants_class = bool(bound.arguments.get("return_dict", option.default))
            arguments = {name: value for name, value in arguments.items() if name != "return_dict"}
            if option.default is not True:
                arguments["return_dict"] = True  # the graph always makes the output class
        for name in TIMESTEP_INPUTS:
            value = arguments.get(name)
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
                arguments[name] = _as_tensor(name, value).to(self._device())
        return arguments, wants_class

    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))


def plain_number(value: Any) -> Any:
    """``value``, a number of numpy's as the Python number that it is."""
    scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if scalar else value


def _as_tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise InputError(f"{checks.told(name, value)} must be a number that int64 can hold") from error


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return (
        type(value) is type(default) and not isinstance(value, Tensor) and constant_key(value) == constant_key(default)
    )


def signature_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """A hashable key of what a graph is specific to: structure, shapes, strides, dtypes, devices, constants, and the
    modes that the caller is in, autocast and diffusers' attention backend.

    Raises:
        InputError: a constant that cannot be compared with the next call's, such as an array, or a sparse tensor.
    """
    leaves, spec = pytree.tree_flatten(dict(arguments))
    for leaf in leaves:
        if not isinstance(leaf, Tensor | Hashable):
            raise InputError(f"an input is a {type(leaf).__name__}; pass a torch.Tensor, a number, a string or None")
    leaves_of = tuple(
        (leaf.shape, _strides(leaf), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else constant_key(leaf)
        for leaf in leaves
    )
    return (str(spec), leaves_of, _modes(leaves))


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides that matter; None where the tensor is contiguous.

    Raises:
        InputError: a sparse tensor.
    """
    if tensor.layout is not torch.strided:
        raise InputError(f"an input of shape {tuple(tensor.shape)} is {tensor.layout}; pass a dense one, to_dense()")
    if tensor.is_contiguous():
        return None
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _modes(leaves: Iterable[object]) -> tuple[tuple[str, object], ...]:
    """The caller's modes by name: autocast and its dtype on the devices of ``leaves``, diffusers' attention backend."""
    devices = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)})
    casts = [
        (f"autocast on {device}", torch.get_autocast_dtype(device)) for device in devices if autocast_enabled(device)
    ]
    return (*casts, ("attention backend", attention_backend()))


def described(arguments: Mapping[str, Any], grid: Hint | None) -> str:
    """The signature in a line, such as ``sample (2, 4, 64, 64) float32, timestep () int64``."""
    extra = (("grid", grid), *_modes(pytree.tree_leaves(dict(arguments))))
    told = [*arguments.items(), *((name, value) for name, value in extra if value not in (None, "native"))]
    return ", ".join(f"{name} {_described(value)}" for name, value in told)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {_described(value.dtype)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} {_described(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    return str(value).removeprefix("torch.")


def as_calls(example_inputs: Iterable[object]) -> list[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Example inputs as ``(args, kwargs)``: each is such a pair, or the keyword arguments alone.

    Raises:
        InputError: there is none, or one is neither.
    """
    calls = []
    if not isinstance(example_inputs, Iterable) or isinstance(example_inputs, str | Mapping | Tensor):
        told = checks.told("example_inputs", example_inputs)
        raise InputError(f"{told} must be several (args, kwargs), or keyword arguments")
    for example in example_inputs:
        args, kwargs = example if isinstance(example, tuple) and len(example) == 2 else ((), example)
        calls.append((checks.positional("args", args), checks.keywords("kwargs", kwargs)))
    if not calls:
        raise InputError("example_inputs is empty; give one (args, kwargs) for each size")
    return calls


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for ``device``, such as ``"cpu"``."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def flat_tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among ``arguments``, in the order in which a captured graph takes them."""
    return [leaf for leaf in pytree.tree_leaves(dict(arguments)) if isinstance(leaf, Tensor)]


def check_inputs(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuse what would give a wrong answer or a traceback from inside the graph.

    Raises:
        InputError: gradients are asked for, a tensor is on another device than the weights, or the sample has another
            floating dtype.
    """
    check_gradients(arguments)
    # Numbers of one byte are stored in it, not computed.
    weight = next((p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1), None)
    if weight is None:
        return
    for name, tensor in _named_tensors(arguments):
        if tensor.device != weight.device:
            raise InputError(f"{name} is on {tensor.device}, the weights on {weight.device}; move one of them")
        if _is_sample(name, arguments) and tensor.dtype != weight.dtype and not autocast_enabled(weight.device.type):
            raise InputError(f"{name} has dtype {tensor.dtype}, the weights {weight.dtype}; cast one of them")


def check_gradients(arguments: Mapping[str, Any]) -> None:
    """Refuse inputs whose gradients are asked for.

    Raises:
        InputError: one requires gradients, and they are enabled.
    """
    for name, tensor in _named_tensors(arguments):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise InputError(f"{name} requires gradients, which an optimized denoiser does not give; detach it")


def _named_tensors(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    return [(pytree.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _is_sample(name: str, arguments: Mapping[str, Any]) -> bool:
    first = next(iter(arguments))
    return name == f"['{first}']" and arguments[first].is_floating_point()


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
        _check_writes(module.graph, model)
        if changed:
            program, module = _exported_after_a_call(model, arguments, before, numbers or {})
    out_spec = program.call_spec.out_spec
    _check_static(module.graph, type(model).__name__)
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
        with torch.no_grad(), plain_layers(model) as quantized:
            program = torch.export.export(model, (), dict(arguments), strict=False)
            module = program.module(check_guards=False)
    except Exception as error:
        reason = f"torch.export cannot capture {type(model).__name__}: {first_line(error)}"
        raise CaptureError(with_layer(reason, model)) from error
    finally:
        changed = [path for path in state.restore() if path not in numbers]
        clear_caches(model)
    assert isinstance(module, GraphModule)
    put_back(module, quantized)
    return program, module, changed


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


def _check_static(graph: Graph, model: str) -> None:
    """Refuse a graph of which a shape depends on the values of inputs, or that holds what no graph can run."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            raise CaptureError(
                f"{model} cannot be captured: the shape of {node.name} depends on the values of its inputs"
            )
        if node.op == "call_function" and not isinstance(node.target, OpOverload | HigherOrderOperator):
            home = getattr(node.target, "__module__", None) or ""
            if home not in ("_operator", "math", "torch"):
                raise CaptureError(
                    f"{model} cannot be captured: torch.export left a call of {node.target} in the graph"
                )

    if any(isinstance(leaf, str) for leaf in pytree.tree_leaves(graph.output_node().args)):
        raise CaptureError(f"{model} cannot be captured: it returns names where tensors belong; optimize its parts")


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
            if base.op == "get_attr" and base.target not in weights:
                return f"{node.target}, {base.target}"
    return None


def renew(graph: GraphModule, buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Let ``graph`` read other buffers, given as ``(old, new)``, of the same dtypes, devices and shapes."""
    new_of = {id(old): new for old, new in buffers}
    if new_of:
        for module in graph.modules():
            for name, tensor in module._buffers.items():
                module._buffers[name] = new_of.get(id(tensor), tensor)
