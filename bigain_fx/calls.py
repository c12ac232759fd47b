"""Calls to a denoiser: one form for all ways of making them, and the signature that a graph belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bigain_fx.families import attention_backend
from bigain_fx.hooks import stored_weights
from bigain_fx.model_state import constant_key
from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.images import Hint
from bigain_fx.passes.kv import TIMESTEP_INPUTS


class CallBinder:
    """Brings every way of calling a denoiser to one form: keyword arguments that differ from their defaults."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.signature = model, inspect.signature(model.forward)
        parameters = self.signature.parameters.values()
        self._defaults = {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        self._required = {name for name, default in self._defaults.items() if default is inspect.Parameter.empty}
        self._has_only_names = len(self._defaults) == len(self.signature.parameters)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return the canonical keyword arguments, and whether the caller wants the output class.

        Raises:
            InputError: arguments that ``forward`` does not take.
        """
        given = self._named(args, kwargs)
        defaults = self._defaults
        arguments = {
            name: plain_number(value)
            for name, value in given.items()
            if name not in defaults or not _is_default(value, defaults[name])
        }
        wants_class = True
        if "return_dict" in defaults:
            wants_class = bool(given.get("return_dict", defaults["return_dict"]))
            arguments.pop("return_dict", None)
            if defaults["return_dict"] is not True:
                arguments["return_dict"] = True  # the graph always makes the output class
        for name in TIMESTEP_INPUTS:
            value = arguments.get(name)
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
                arguments[name] = _as_tensor(name, value).to(self._device(arguments))
        return arguments, wants_class

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What was given, by name, in the order of the signature."""
        # Pipelines give names: inspect would take more time than everything else here.
        if not args and self._has_only_names and self._required <= kwargs.keys() <= self._defaults.keys():
            return {name: kwargs[name] for name in self._defaults if name in kwargs}
        try:
            bound = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            names = ", ".join(self.signature.parameters)
            raise InputError(f"the denoiser cannot be called so: {error}; its arguments are {names}") from None
        named: dict[str, Any] = {}
        for name, value in bound.items():
            parameter = self.signature.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= value
            elif name not in self._defaults:
                kind = type(value).__name__
                raise InputError(f"{name} (a {kind}) can only be given by position; a denoiser's inputs need names")
            else:
                named[name] = value
        return named

    def _device(self, arguments: Mapping[str, Any]) -> torch.device:
        """That of the sample, which must be the weights'."""
        given = (value.device for value in arguments.values() if isinstance(value, Tensor) and value.ndim)
        weights = (weight.device for weight in self.model.parameters())
        return next(given, None) or next(weights, torch.device("cpu"))


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
    leaves, spec = _flattened(arguments)
    return spec, tuple(map(_key_of, leaves)), _modes(leaves)


def _flattened(arguments: Mapping[str, Any]) -> tuple[list[Any], tuple[object, ...]]:
    """The leaves of ``arguments``, in pytree order, and their structure."""
    leaves: list[Any] = []
    spec: list[object] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):  # most are, and need no pytree
            leaves.append(value)
            spec.append(name)
        else:
            inner, structure = pytree.tree_flatten(value)
            leaves += inner
            spec.append((name, str(structure)))
    return leaves, tuple(spec)


def _key_of(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, _strides(leaf), leaf.dtype, leaf.device
    if not isinstance(leaf, Hashable):
        raise InputError(f"an input is a {type(leaf).__name__}; pass a torch.Tensor, a number, a string or None")
    return constant_key(leaf)


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
    extra = (("grid", grid), *_modes(_flattened(arguments)[0]))
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
    return [leaf for leaf in _flattened(arguments)[0] if isinstance(leaf, Tensor)]


def check_inputs(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuse what would give a wrong answer or a traceback from inside the graph.

    Raises:
        InputError: gradients are asked for, a tensor is on another device than the weights, or the sample has another
            floating dtype.
    """
    check_gradients(arguments)
    # Numbers of one byte are stored in it, not computed.
    stored = stored_weights(model)
    plain = (p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    weight = next((p for p in plain if id(p) not in stored), None)
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
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in flat_tensors(arguments)):
        return
    for name, tensor in _named_tensors(arguments):
        if tensor.requires_grad:
            raise InputError(f"{name} requires gradients, which an optimized denoiser does not give; detach it")


def _named_tensors(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    return [(pytree.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _is_sample(name: str, arguments: Mapping[str, Any]) -> bool:
    first = next(iter(arguments))
    return name == f"['{first}']" and arguments[first].is_floating_point()
