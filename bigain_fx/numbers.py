"""Floats that change from call to call: from their second value on they are inputs of the graph.

Every float that ``forward`` reads, as an argument or as an attribute of the model, is a constant of the captured graph.
One that is moved by a slider would make a graph for each value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_CONSTANT = "a number"


class Numbers:
    """Which float arguments are inputs, as 0-d tensors of the weights' device.

    Attributes:
        kept: why others stay constants, by path.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        self._order = {name: index for index, name in enumerate(parameters)}
        self._defaults = {
            name: parameter.default for name, parameter in parameters.items() if type(parameter.default) is float
        }
        self._paths: set[str] = set()
        self._seen: dict[object, list[dict[str, float]]] = {}
        self._tensors: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self.kept: dict[str, str] = {}

    def as_inputs(self, arguments: Mapping[str, Any], more: Iterable[str] = ()) -> Mapping[str, Any]:
        """Return ``arguments`` with tensors in the places of those floats, and of ``more``."""
        paths = self._paths.union(more)
        if not paths:
            return arguments
        whole = self._with_defaults(arguments, paths)
        return _mapped(lambda path, value: self.tensor(float(value)) if path in paths else value, whole)

    def moving(self, arguments: Mapping[str, Any], signature: Callable[[Mapping[str, Any]], object]) -> set[str]:
        """Return the paths of the floats that have another value in an earlier call which was equal but for floats.

        Args:
            arguments: of a call that has no graph yet.
            signature: gives the key of arguments.
        """
        found: dict[str, float] = {}

        def note(path: str, value: float) -> object:
            if type(value) is not float:
                return value
            found[path] = value
            return _CONSTANT

        whole = self._with_defaults(arguments, self._defaults)
        seen = self._seen.setdefault(signature(_mapped(note, whole)), [])
        moved = {path for earlier in seen for path, value in found.items() if repr(earlier[path]) != repr(value)}
        seen.append(found)
        return moved - self.kept.keys()

    def _with_defaults(self, arguments: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
        """``arguments`` with the default value of the floats among ``names`` that are not given."""
        missing = {name: self._defaults[name] for name in names if name in self._defaults and name not in arguments}
        if not missing:
            return arguments
        last = len(self._order)
        return dict(sorted({**arguments, **missing}.items(), key=lambda item: self._order.get(item[0], last)))

    def promote(self, paths: Iterable[str]) -> None:
        """Make inputs of these from now on."""
        self._paths.update(paths)

    def tensor(self, value: float) -> Tensor:
        """Return ``value`` as a 0-d tensor: float32, or float64 for weights of that."""
        weight = next((each for each in self._model.parameters() if each.is_floating_point()), torch.empty(()))
        key = (value, torch.promote_types(weight.dtype, torch.float32), weight.device)
        if key not in self._tensors:
            if len(self._tensors) > 1000:
                self._tensors.clear()
            self._tensors[key] = torch.tensor(key[0], dtype=key[1], device=key[2])
        return self._tensors[key]


def _mapped(change: Callable[[str, float], Any], arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """``arguments`` with ``change(path, value)`` in the place of every number."""
    leaves, spec = pytree.tree_flatten_with_path(dict(arguments))
    changed = [change(_path(path), leaf) if type(leaf) in (float, int) else leaf for path, leaf in leaves]
    mapped: Mapping[str, Any] = pytree.tree_unflatten(changed, spec)
    return mapped


def _path(keys: pytree.KeyPath) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
