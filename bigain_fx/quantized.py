"""Quantized weights and layers in a captured graph: each stays one node, a plain one as long as the graph is worked on.

torchao's weights are tensor subclasses. Traced through, a linear layer becomes the integer products and scales that it
is made of, and nobody can tell its input from its output any more. So the graph is captured with plain stand-ins of the
same shape and dtype, which hold no memory, and gets the real weights afterwards.

Other quantizers bring layers of their own (bitsandbytes, GGUF, quanto), whose weights are bytes of any shape. Such a
layer is captured as the plain operator that it acts as, on a weight that stands for the whole layer::

    layer(x)      ->      aten.linear(x, LayerWeight)      ->      layer(x), on fewer tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bigain_fx.passes.arguments import slice_range
from bigain_fx.passes.axes import aten
from bigain_fx.passes.errors import CaptureError, first_line
from bigain_fx.passes.surgery import Surgeon

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# What a layer is called with while it is captured: it is gone from the graph before anything runs it.
torch.library.define("bigain::weight_of", "(Tensor x, str path, int[] shape) -> Tensor")
torch.library.register_fake("bigain::weight_of", lambda x, path, shape: x.new_empty(shape))
_WEIGHTS: dict[str, Any] = {"op": "call_function", "target": torch.ops.bigain.weight_of.default}


class LayerWeight(nn.Parameter):
    """A weight without memory that stands for a whole layer, of any kind.

    Attributes:
        path: of the layer.
        layer: what is called in the end.
    """

    path: str
    layer: nn.Module

    @classmethod
    def of(cls, path: str, layer: nn.Module, like: Tensor) -> LayerWeight:
        """A weight of the shape, dtype and device of ``like``."""
        plain = torch.empty((), dtype=like.dtype, device=like.device).expand(like.shape)
        weight = torch.Tensor._make_subclass(cls, plain, False)
        weight.path, weight.layer = path, layer
        return weight


@dataclass(frozen=True)
class Quantized:
    """What stand-ins were put in the places of, by path: weights, and layers as a whole."""

    weights: Mapping[str, nn.Parameter]
    layers: Mapping[str, nn.Module]


def _is_quantized(weight: object) -> bool:
    return isinstance(weight, nn.Parameter) and bool(is_traceable_wrapper_subclass(weight))


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a quantized layer: a graph calls it as it is.

    It acts as a linear layer or a convolution, by its sizes; has a forward of its own and no submodules; and its weight
    is none that the plain operator could take.
    """
    shape = _weight_shape(module)
    if shape is None or not _has_own_forward(module):
        return False
    weight: Any = getattr(module, "weight", None)
    return type(weight) not in (Tensor, nn.Parameter) or weight.shape != shape or weight.dtype not in _PLAIN


def _has_own_forward(module: nn.Module) -> bool:
    return not module._modules and type(module).forward not in (kind.forward for kind in (nn.Linear, *_CONVOLUTIONS))


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the plain weight that ``module`` would have; None if it is neither linear nor a convolution."""
    if isinstance(module, _CONVOLUTIONS):
        plain = module.padding_mode == "zeros"
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size) if plain else None
    shape = tuple(getattr(module, name, None) for name in ("out_features", "in_features"))
    return shape if all(type(size) is int for size in shape) else None  # type: ignore[return-value]


def named(owner: object) -> str:
    """``owner`` by its class and the package that it is from, such as ``Linear4bit of bitsandbytes``."""
    return f"{type(owner).__name__} of {type(owner).__module__.partition('.')[0]}"


def first_layer(model: nn.Module) -> str | None:
    """The first quantized layer of ``model`` in words, or None."""
    layers = (f"{path} ({named(module)})" for path, module in model.named_modules() if is_layer(module))
    return next(layers, None)


def first_quantized(model: nn.Module) -> str | None:
    """The first quantized layer or weight of ``model`` in words, or None."""
    weights = (f"{path} ({named(weight)})" for path, weight in model.named_parameters() if _is_quantized(weight))
    return first_layer(model) or next(weights, None)


def with_layer(reason: str, model: nn.Module) -> str:
    """``reason``, and a layer of ``model`` with a forward of its own, one that was traced if there is any."""
    layers = [(is_layer(module), path, named(module)) for path, module in model.named_modules()
              if _weight_shape(module) and _has_own_forward(module)]  # fmt: skip
    if not layers:
        return reason
    _, path, kind = min(layers, key=itemgetter(0))
    return f"{reason}; a layer that computes in its own way is {path} ({kind})"


def kinds_of(graph: GraphModule) -> list[str]:
    """The types of the weights of a graph, and of the layers that it calls."""
    layers = [graph.get_submodule(str(node.target)) for node in graph.graph.find_nodes(op="call_module")]
    return sorted({named(each) for each in (*graph.parameters(), *layers)})


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[Quantized]:
    """While it is open, plain stand-ins are in the places of quantized weights, and of quantized layers."""
    modules = dict(model.named_modules())
    layers = {path: module for path, module in modules.items() if path and is_layer(module)}
    twins = {id(layer): _twin(path, layer) for path, layer in layers.items()}
    parts = [
        (module, name, part)
        for module in modules.values()
        for name, part in module._modules.items()
        if id(part) in twins
    ]
    held = [
        (f"{path}.{name}" if path else name, module, name, weight)
        for path, module in modules.items()
        if id(module) not in twins
        for name, weight in module._parameters.items()
        if weight is not None and _is_quantized(weight)
    ]
    try:
        for _, module, name, weight in held:
            module._parameters[name] = _without_memory(weight)
        for module, name, part in parts:
            module._modules[name] = twins[id(part)]
        yield Quantized({path: weight for path, _, _, weight in held}, layers)
    finally:
        for module, name, part in parts:
            module._modules[name] = part
        for _, module, name, weight in held:
            module._parameters[name] = weight


def _without_memory(weight: nn.Parameter) -> nn.Parameter:
    plain = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    return nn.Parameter(plain, requires_grad=False)


def _twin(path: str, layer: nn.Module) -> nn.Module:
    """A copy of ``layer`` that acts as the plain operator; the layer itself may be at work in another thread.

    Its hooks are left out: they run with the layer.
    """
    twin: nn.Module = object.__new__(type(layer))
    weights = {
        name: _without_memory(weight) if weight is not None and _is_quantized(weight) else weight
        for name, weight in layer._parameters.items()
    }
    own = {"_parameters": weights, "_buffers": dict(layer._buffers), "_forward_hooks": {}, "_forward_pre_hooks": {}}
    vars(twin).update(vars(layer) | own, forward=_plain_forward(path, layer))
    return twin


def _plain_forward(path: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The operator that ``layer`` acts as, without a bias, on a weight that names it."""
    shape = _weight_shape(layer)

    def forward(x: Tensor) -> Tensor:
        weight = torch.ops.bigain.weight_of(x, path, shape)
        if isinstance(layer, _CONVOLUTIONS):
            convolved: Tensor = layer._conv_forward(x, weight, None)
            return convolved
        return nn.functional.linear(x, weight)

    return forward


def put_back(graph: GraphModule, quantized: Quantized) -> None:
    """Give a graph that was captured with stand-ins its quantized weights, and for each layer one that stands for it.

    Raises:
        CaptureError: a layer that does not act as the plain operator that it was taken for.
    """
    path: Any
    for path, weight in quantized.weights.items():
        owner, _, name = path.rpartition(".")
        graph.get_submodule(owner)._parameters[name] = weight
    if not quantized.layers:
        return
    Surgeon(graph).inline_contexts()
    for inner in _inner(graph):
        for node in inner.graph.find_nodes(**_WEIGHTS):
            path = node.args[1]
            kind = named(quantized.layers[path])
            raise CaptureError(f"{path} ({kind}) runs under an autocast of its own, which no graph can hold")
    for node in graph.graph.find_nodes(**_WEIGHTS):
        path = node.args[1]
        layer = quantized.layers[path]
        _check_acts(path, layer, next(iter(node.users)))
        _stand_for(graph, node, LayerWeight.of(path, layer, node.meta["val"]))


def _inner(module: GraphModule) -> Iterator[GraphModule]:
    """The graphs that nodes of ``module`` call."""
    for node in module.graph.find_nodes(op="get_attr"):
        inner = getattr(module, str(node.target), None) if node.users else None
        if isinstance(inner, GraphModule):
            yield inner
            yield from _inner(inner)


def _stand_for(graph: GraphModule, node: Node, weight: LayerWeight) -> None:
    name = f"bigain_weight_{sum(isinstance(each, LayerWeight) for each in graph.parameters(recurse=False))}"
    graph.register_parameter(name, weight)
    with graph.graph.inserting_before(node):
        read = graph.graph.get_attr(name)
    read.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(read)
    graph.graph.erase_node(node)


def _check_acts(path: str, layer: nn.Module, call: Node) -> None:
    """Run ``layer`` on a few ones: its result must be of the kind that the graph was captured with.

    Some layers get ready at their first call, and look like others afterwards.
    """
    x, made = call.args[0].meta["val"], call.meta["val"]  # type: ignore[union-attr]
    if x.device.type == "meta":
        return
    channels, window = [x.shape[-1]], []
    if isinstance(layer, _CONVOLUTIONS):
        spans = zip(layer.dilation, layer.kernel_size, strict=True)
        channels, window = [layer.in_channels], [1 + step * (size - 1) for step, size in spans]
    sizes = [1] * (x.ndim - len(channels) - len(window)) + channels + window
    try:
        with torch.no_grad():
            found = layer(torch.ones(sizes, dtype=x.dtype, device=x.device))
    except Exception as error:
        raise CaptureError(f"{path} ({named(layer)}) does not run: {first_line(error)}") from error
    if type(found) is not Tensor:
        kind = f"the type {named(found)}"
    elif _kind(found, -1 - len(window)) != _kind(made, -1 - len(window)):
        kind = f"{tuple(found.shape)} {found.dtype} for {tuple(sizes)} {x.dtype}"
    else:
        return
    raise CaptureError(
        f"{path} ({named(layer)}) gives {kind}, where a plain layer keeps the kind of tensor; quantize weights alone, "
        "and let it compute in the dtype of the model"
    )


def _kind(tensor: Tensor, channels: int) -> tuple[object, ...]:
    return tensor.dtype, tensor.ndim, tensor.shape[channels] if tensor.ndim >= -channels else None


def call_quantized(graph: GraphModule) -> None:
    """Let a graph call its quantized layers as they are, in the places of the weights that stand for them.

    Quantized weights override ``F.linear``; ``aten.linear`` they do not.
    """
    if any(map(_is_quantized, graph.parameters())):
        for node in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
            node.target = nn.functional.linear
    for read in graph.graph.find_nodes(op="get_attr"):
        weight = getattr(graph, str(read.target), None)
        if isinstance(weight, LayerWeight):
            graph.add_submodule(weight.path, weight.layer)
            _call_layer(read, weight.path)
            delattr(graph, str(read.target))
    graph.recompile()


def _call_layer(read: Node, path: str) -> None:
    """Call the layer at ``path`` in the place of all that reads ``read``, its weight, or some rows of it."""
    graph, calls, cuts = read.graph, dict[Any, Node](), dict[Node, Node]()
    for reader in list(read.users):
        if reader.target is aten.slice.Tensor:
            cuts |= dict.fromkeys(reader.users, reader)
        else:
            reader.op, reader.target, reader.args, reader.kwargs = "call_module", path, reader.args[:1], {}
    for part in sorted(cuts):
        x = part.args[0]
        if x not in calls:
            with graph.inserting_before(part):
                calls[x] = graph.call_module(path, (x,))
            calls[x].meta = dict(part.meta)
        part.target, part.args = aten.slice.Tensor, (calls[x], -1, *slice_range(cuts[part])[:2])
    for node in (*set(cuts.values()), read):
        graph.erase_node(node)
