"""Calls to a denoiser, and their capture as one flat pre-dispatch ATen graph."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from bigain_fx.passes.errors import CaptureError, InputError, first_line
from bigain_fx.passes.kv import TIMESTEP_INPUTS


@dataclass(frozen=True)
class Captured:
    """One graph of a denoiser for one input signature.

    Attributes:
        module: takes the flat tensor inputs in order, returns the flat outputs; its parameters are the model's own.
        out_spec: the pytree of the model's output, its output class included.
    """

    module: GraphModule
    out_spec: pytree.TreeSpec


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
                raise InputError(f"{name}={value!r} can only be given by position; a denoiser's inputs need names")
            elif not _is_default(value, parameter.default):
                arguments[name] = value
        wants_class = True
        if option := self.signature.parameters.get("return_dict"):
            wants_class = bool(bound.arguments.get("return_dict", option.default))
            arguments = {name: value for name, value in arguments.items() if name != "return_dict"}
            if option.default is not True:
                arguments["return_dict"] = True  # the graph always makes the output class
        for name in TIMESTEP_INPUTS:
            value = arguments.get(name)
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
                arguments[name] = torch.as_tensor(value).to(self._device())
        return arguments, wants_class

    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and not isinstance(value, Tensor) and value == default)


def signature_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """A hashable key of what a graph is specific to: structure, shapes, dtypes, devices, constants, autocast.

    Raises:
        InputError: a constant that cannot be compared with the next call's, such as an array.
    """
    leaves, spec = pytree.tree_flatten(dict(arguments))
    for leaf in leaves:
        if not isinstance(leaf, Tensor | Hashable):
            raise InputError(f"an input is a {type(leaf).__name__}; pass a torch.Tensor, a number, a string or None")
    described = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    )
    devices = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)})
    autocast = tuple((device, torch.get_autocast_dtype(device)) for device in devices if autocast_enabled(device))
    return (str(spec), described, autocast)


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for ``device``, such as ``"cpu"``."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def flat_tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among ``arguments``, in the order in which a captured graph takes them."""
    return [leaf for leaf in pytree.tree_leaves(dict(arguments)) if isinstance(leaf, Tensor)]


def capture(model: nn.Module, arguments: Mapping[str, Any]) -> Captured:
    """Capture ``model(**arguments)`` with ``torch.export``: pre-dispatch ATen, static shapes, weights shared.

    Args:
        model: a denoiser in eval mode.
        arguments: canonical keyword arguments, as :meth:`CallBinder.bind` returns them.

    Raises:
        CaptureError: ``torch.export`` cannot capture it; its error is chained.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(model, (), dict(arguments), strict=False)
            module = program.module(check_guards=False)
    except Exception as error:
        raise CaptureError(f"torch.export cannot capture {type(model).__name__}: {first_line(error)}") from error
    assert isinstance(module, GraphModule)
    out_spec = program.call_spec.out_spec
    leaves = pytree.tree_leaves(dict(arguments))
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, leaf in zip(inputs, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            node.replace_all_uses_with(leaf)
            module.graph.erase_node(node)
    module.graph.set_codegen(CodeGen())
    # A fresh module leaves behind the input checks that export hangs on its own.
    return Captured(GraphModule(module, module.graph), out_spec)
