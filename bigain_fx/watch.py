"""Whether a model is still the one that was captured.

A captured graph shares its weights with the model: what is written into them is seen at once. Everything else that
``forward`` may have read is a constant of the graph: which weights, submodules and hooks there are, and every plain
attribute, down to the attributes of attention processors. A :class:`Watch` compares all of it, object by object, with
what it was; only where an object is another one are values compared.
"""

from __future__ import annotations

import copy
import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bigain_fx.quantized import is_layer

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, enum.Enum)
_REGISTRIES = {"_parameters", "_buffers", "_modules"}
_READ_BY_CALLS = _REGISTRIES | {"training", "_forward_hooks", "_forward_pre_hooks"}
# A hook of accelerate or diffusers that does anything is also an attribute called forward.
_SKIPPED = (set(vars(nn.Module())) - _READ_BY_CALLS) | {"_hf_hook", "_diffusers_hook"}
_END = object()


@dataclass(frozen=True)
class Change:
    """What became of a model.

    Attributes:
        what: paths of what changed, as text; empty if nothing did.
        renewed: buffers that gave way to others of their dtype, device and shape, as ``(old, new)``: every move of a
            model, there and back, does that to all of them.
    """

    what: str = ""
    renewed: tuple[tuple[Tensor, Tensor], ...] = ()


class Watch:
    """What a graph of ``model`` depends on, beside the values of its weights.

    Not seen: what is two objects away from a module, in a closure or in compiled code; modules in plain lists.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._take()

    def changed(self) -> Change:
        """What changed since the last call, or since this was made."""
        if all(map(is_, self._live(), self._objects)) and self._kinds == self._kinds_now():
            return Change()
        before = copy.copy(self)  # it keeps what was there alive: no new object has the identity of an old one
        self._take()
        old, new = before._facts, self._facts
        paths = [path for path in {**old, **new} if old.get(path, _END) != new.get(path, _END)]
        renewed = self._renewed(before, paths)
        rest = [path for path in paths if path not in renewed]
        what = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
        return Change(what, tuple(renewed.values()))

    def _renewed(self, before: Watch, paths: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """The buffers among ``paths`` in whose place another is now, and nowhere else."""
        places, held = Counter(map(id, before._tensors)), set(map(id, self._tensors))
        pairs = {path: (before._buffers.get(path), self._buffers.get(path)) for path in paths}
        return {
            path: (old, new)
            for path, (old, new) in pairs.items()
            if old is not None and new is not None and type(old) is type(new) and _kind(old) == _kind(new)
            and places[id(old)] == 1 and id(old) not in held
        }  # fmt: skip

    def _take(self) -> None:
        self._facts: dict[str, object] = {}
        self._modules: list[nn.Module] = []
        self._holders: list[Iterable[object]] = []
        self._tensors: list[Tensor] = []
        self._entered: set[int] = set()
        self._buffers = dict(self._model.named_buffers(remove_duplicate=False))
        for path, module in self._model.named_modules():
            self._modules.append(module)
            if is_layer(module):  # which graphs call as it is
                self._note(path, module)
                continue
            self._holders.append(vars(module).values())
            self._note(path or type(module).__name__, module)
            for name, value in vars(module).items():
                if name not in _SKIPPED:
                    self._note(_joined(path, "" if name in _REGISTRIES else name), value)
        self._objects = list(self._live())
        self._kinds = self._kinds_now()

    def _note(self, path: str, value: object, *, inside: bool = False) -> None:
        """Note what ``value`` is; ``inside`` an object, other objects are told apart but not entered."""
        if isinstance(value, _CONSTANTS):
            self._facts[path] = (type(value), value)
        elif isinstance(value, Tensor):
            self._tensors.append(value)
            self._facts[path] = (id(value), *_kind(value))
        elif isinstance(value, dict):
            self._enter(path, value, value.values(), value, inside)
        elif isinstance(value, list | tuple):
            self._enter(path, value, value, dict(enumerate(value)), inside)
        elif isinstance(value, set | frozenset):
            self._holders.append(value)
            self._facts[path] = frozenset(value)
        else:
            self._facts[path] = (id(value), type(value))
            if hasattr(value, "__dict__") and not isinstance(value, nn.Module | ModuleType | type) and not inside:
                self._enter(path, value, vars(value).values(), vars(value), True)

    def _enter(
        self, path: str, owner: object, live: Iterable[object], items: Mapping[Any, object], inside: bool
    ) -> None:
        if id(owner) not in self._entered:
            self._entered.add(id(owner))
            self._holders.append(live)
            for name, value in items.items():
                if not str(name).startswith("__"):
                    self._note(_joined(path, str(name)), value, inside=inside)

    def _live(self) -> Iterable[object]:
        return chain(map(type, self._modules), chain.from_iterable(self._holders), (_END,))

    def _kinds_now(self) -> list[tuple[object, ...]]:
        with torch._C.DisableTorchFunctionSubclass():  # which makes these attributes of quantized weights slow
            return [_kind(tensor) for tensor in self._tensors]


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def hook_in(model: nn.Module) -> str | None:
    """The first hook of accelerate or diffusers in ``model`` that a graph cannot hold, in words, or None.

    Such hooks bring weights in and out, or decide at every call what to compute.
    """
    for path, module in model.named_modules():
        at = f" at {path}" if path else ""
        outer = vars(module).get("_hf_hook")
        for hook in getattr(outer, "hooks", (outer,)):
            if hook is not None and getattr(hook, "offload", True):
                return f"accelerate's {type(hook).__name__}{at}"
        if hooks := getattr(vars(module).get("_diffusers_hook"), "hooks", None):
            return f"diffusers' {next(iter(hooks))!r}{at}"
    return None
