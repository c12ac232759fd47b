"""What a captured graph takes from its model, beside the values of weights.

A captured graph shares its weights with the model: what is written into them is seen at once. Everything else that
``forward`` may have read is a constant of the graph: which weights, submodules and hooks there are, and every plain
attribute, down to the attributes of attention processors.
"""

from __future__ import annotations

import enum
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bigain_fx.quantized import is_layer

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, enum.Enum)
_REGISTRIES = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# A hook of accelerate or diffusers that does anything is also an attribute called forward.
_SKIPPED = frozenset(vars(nn.Module())) - {"training", *_REGISTRIES, *HOOKS} | {"_hf_hook", "_diffusers_hook"}
_END = object()

Container = dict[Any, Any] | list[Any] | set[Any]


@dataclass(frozen=True)
class Holder:
    """A container that ``forward`` may read, and what was in it.

    Attributes:
        path: of what it belongs to, such as ``"mid_block.attentions.0.processor"``.
        container: the attributes of an object, a dict, a list or a set.
        held: a copy.
        skipped: names that do not matter.
    """

    path: str
    container: Container
    held: Container
    skipped: frozenset[str] = frozenset()

    def changes(self) -> list[str]:
        """Return the names of what was put in, taken out or exchanged since."""
        now, then = _items(self.container), _items(self.held)
        if len(now) == len(then) and all(map(is_, now.values(), then.values())) and all(map(is_, now, then)):
            return []
        names = [name for name in {**then, **now} if not _is_same(now.get(name, _END), then.get(name, _END))]
        return [name for name in names if name not in self.skipped]

    def differences(self) -> list[str]:
        """Return the paths of what is not even equal."""
        now, then = _items(self.container), _items(self.held)
        names = [name for name in self.changes() if not _is_equal(now.get(name, _END), then.get(name, _END))]
        return [joined(self.path, str(name)) for name in names]

    def restore(self) -> None:
        """Put back what was in it, and touch nothing else: another thread may be reading."""
        if isinstance(self.container, list):
            self.container[:] = self.held
        elif isinstance(self.container, set):
            self.container.symmetric_difference_update(self.container ^ set(self.held))
        else:
            # Some dicts (a config of diffusers) refuse to be written.
            kind: Any = OrderedDict if isinstance(self.container, OrderedDict) else dict
            if list(self.container) != list(self.held):
                kind.clear(self.container)
            for name, value in self.held.items():  # type: ignore[union-attr]
                if self.container.get(name, _END) is not value:
                    kind.__setitem__(self.container, name, value)


def _items(container: Container) -> Mapping[Any, Any]:
    if isinstance(container, dict):
        return container
    return dict(enumerate(container)) if isinstance(container, list) else dict.fromkeys(container)


class ModelState:
    """What ``model`` is now.

    Not seen: what is two objects away from a module, in a closure or in compiled code; modules in plain lists.

    Attributes:
        facts: what is where, by path. Equal facts make equal graphs. A buffer that another of its dtype, device and
            shape takes the place of is none: every move of a model does that to all of them.
        holders: where all of it is kept.
        modules: of the model.
        tensors: all of them, and ``buffers`` by path.
    """

    def __init__(self, model: nn.Module) -> None:
        self.facts: dict[str, Hashable] = {}
        self.holders: list[Holder] = []
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self.buffers: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
        self._buffer_at = {id(tensor): path for path, tensor in reversed(self.buffers.items())}
        self._entered: set[int] = set()
        for path, module in model.named_modules():
            self._note(path or type(module).__name__, module)
            if path and is_layer(module):  # which graphs call as it is
                continue
            self.modules.append(module)
            attributes = vars(module)
            self._hold(path, attributes, _SKIPPED)
            for name in _REGISTRIES:
                self._enter(path, attributes[name], attributes[name], inside=False)
            for name, value in attributes.items():
                if name not in _SKIPPED and name not in _REGISTRIES:
                    self._note(joined(path, name), value)
        self.kinds, self.classes = self.kinds_now(), list(map(type, self.modules))

    @property
    def weights(self) -> set[int]:
        """Identities of the tensors that are no buffers."""
        buffers = set(map(id, self.buffers.values()))
        return {id(tensor) for tensor in self.tensors} - buffers

    def number(self, path: str) -> float:
        """Return the float at ``path``."""
        fact: Any = self.facts[path]
        assert fact[0] is float
        return float(fact[1])

    def place(self, path: str) -> tuple[Any, Any] | None:
        """Return the dict or list that has ``path`` as an item, and the item's name in it; None if none has."""
        for holder in self.holders:
            if path.startswith(holder.path) and not isinstance(holder.container, set):
                for name in _items(holder.held):
                    if joined(holder.path, str(name)) == path:
                        return holder.container, name
        return None

    def kinds_now(self) -> list[tuple[object, ...]]:
        """Return dtype, device, shape and gradient of every tensor as it is now."""
        with torch._C.DisableTorchFunctionSubclass():  # which makes these attributes of quantized weights slow
            return [_kind(tensor) for tensor in self.tensors]

    def same_kinds(self) -> bool:
        """Return whether every tensor has the dtype, device, shape and gradient that it had."""
        return self.kinds == self.kinds_now()

    def same_objects(self) -> bool:
        """Return whether all that was found here is where it was, whatever was written meanwhile."""
        return (
            self.same_kinds()
            and self.classes == list(map(type, self.modules))
            and not any(holder.changes() for holder in self.holders)
        )

    def restore(self) -> list[str]:
        """Put back what is not where it was; return the paths of what was not even equal."""
        changed = [holder for holder in self.holders if holder.changes()]
        paths = [path for holder in changed for path in holder.differences()]
        for holder in changed:
            holder.restore()
        return paths

    def differences(self, other: ModelState) -> list[str]:
        """Return the paths of the facts in which ``other`` differs."""
        paths = dict.fromkeys([*self.facts, *other.facts])
        return [path for path in paths if self.facts.get(path, _END) != other.facts.get(path, _END)]

    def renewed(self, other: ModelState) -> list[tuple[Tensor, Tensor]]:
        """Return the buffers in whose place ``other`` has another, as ``(old, new)``."""
        pairs = ((tensor, other.buffers.get(path)) for path, tensor in self.buffers.items())
        return [(old, new) for old, new in pairs if new is not None and new is not old]

    def _note(self, path: str, value: object, *, inside: bool = False) -> None:
        """Note what ``value`` is; ``inside`` an object, other objects are told apart but not entered."""
        if isinstance(value, _CONSTANTS):
            self.facts[path] = constant_key(value)
        elif isinstance(value, Tensor):
            self.tensors.append(value)
            self.facts[path] = (self._buffer_at.get(id(value), id(value)), type(value), *_kind(value))
        elif isinstance(value, dict):
            self._enter(path, value, value, inside)
        elif isinstance(value, list):
            self._enter(path, value, dict(enumerate(value)), inside)
        elif isinstance(value, tuple):
            self.facts[path] = ("tuple",)
            for index, item in enumerate(value):
                self._note(joined(path, str(index)), item, inside=inside)
        elif isinstance(value, set | frozenset):
            self.facts[path] = frozenset(value)
            if isinstance(value, set):
                self._hold(path, value)
        else:
            self.facts[path] = (id(value), type(value))
            if not isinstance(value, nn.Module | ModuleType | type) and not inside:
                attributes = getattr(value, "__dict__", None)
                if type(attributes) is dict:
                    self._enter(path, attributes, attributes, inside=True, fact=self.facts[path])

    def _enter(
        self, path: str, container: Any, items: Mapping[Any, object], inside: bool, fact: Hashable = None
    ) -> None:
        if fact is None and path not in self.facts:
            self.facts[path] = (type(container),)
        if id(container) in self._entered:
            return
        self._entered.add(id(container))
        self._hold(path, container)
        for name, value in items.items():
            if not str(name).startswith("__"):
                self._note(joined(path, str(name)), value, inside=inside)

    def _hold(self, path: str, container: Container, skipped: frozenset[str] = frozenset()) -> None:
        self.holders.append(Holder(path, container, _copied(container), skipped))


def clear_caches(model: nn.Module) -> None:
    """Clear the caches (``functools.lru_cache``) of the code that ``model`` is made of: of its classes and their files.

    Called within a capture they keep fake tensors.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    files = {kind.__module__ for kind in kinds if not kind.__module__.startswith(("torch.", "builtins"))}
    places = [*kinds, *(sys.modules[name] for name in files if name in sys.modules)]
    for value in [value for place in places for value in list(vars(place).values())]:
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()


def constant_key(value: object) -> Hashable:
    """Return what tells constants apart: 0.0 from -0.0 and from False, but not one NaN from another."""
    return type(value), repr(value) if isinstance(value, float | complex) else value


def _is_same(first: object, second: object) -> bool:
    """Whether two values are one, or equal constants."""
    if first is second or type(first) is not type(second):
        return first is second
    return isinstance(first, _CONSTANTS) and constant_key(first) == constant_key(second)


def _is_equal(first: object, second: object) -> bool:
    """Whether two values are the same, or hold the same ones."""
    if type(first) is type(second) and isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_is_equal, first, second))
    if type(first) is type(second) and isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_is_equal(first[name], second[name]) for name in first)
    return _is_same(first, second)


def some(paths: Sequence[str]) -> str:
    """Return the first three of ``paths``, and how many more there are."""
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _copied(container: Container) -> Container:
    kinds: Iterable[tuple[type, Callable[..., Any]]] = ((dict, dict), (list, list), (set, set))
    return next(copy for kind, copy in kinds if isinstance(container, kind))(container)  # type: ignore[no-any-return]


def _kind(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad


def joined(path: str, name: str) -> str:
    """Return ``path.name``."""
    return f"{path}.{name}" if path and name else path or name
