"""The private names of torch that calls to a denoiser rely on, seen in torch 2.11 to 2.13."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._dynamo.convert_frame import compile_lock


class Versions:
    """Tell cheaply whether modules were given other attributes or classes, and dicts other items.

    Every write into a dict gives it another version, which Dynamo's guards compare: a few nanoseconds a dict.

    Args:
        modules: their classes and attributes are watched.
        dicts: their items are watched.
    """

    def __init__(self, modules: Sequence[nn.Module], dicts: Sequence[dict[Any, Any]]) -> None:
        from torch._C._dynamo.guards import RootGuardManager
        from torch._dynamo.guards import GuardManagerType

        plain = GuardManagerType.GUARD_MANAGER
        self._held = (tuple(modules), tuple(dicts))
        self._root = RootGuardManager()
        each = self._root.tuple_getitem_manager(0, "modules", self._held[0], plain)
        for index, module in enumerate(self._held[0]):
            of_module = each.tuple_getitem_manager(index, "", module, plain)
            _add(of_module.add_type_match_guard, id(type(module)))
            _add(of_module.get_generic_dict_manager("", vars(module), plain).add_dict_version_guard, vars(module))
        each = self._root.tuple_getitem_manager(1, "dicts", self._held[1], plain)
        for index, items in enumerate(self._held[1]):
            _add(each.tuple_getitem_manager(index, "", items, plain).add_dict_version_guard, items)

    def same(self) -> bool:
        """Return whether nothing was written since this was made."""
        return bool(self._root.check(self._held))


def _add(guard: Callable[..., None], value: object) -> None:
    """Add a leaf guard; some versions of torch take a user's stack behind its text."""
    try:
        guard(value, [""], None)
    except TypeError:
        guard(value, [""])


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Keep all other threads from capturing and compiling.

    ``torch.export`` and Dynamo are each one for the process; Dynamo holds this lock while it compiles.
    """
    _wait_before_forks()
    with compile_lock:
        yield


@cache
def _wait_before_forks() -> None:
    """Let a fork wait for the lock: the child of a thread that does not have it could never take it."""
    os.register_at_fork(
        before=compile_lock.acquire, after_in_parent=compile_lock.release, after_in_child=compile_lock.release
    )


def compiler(
    backend: str | Callable[..., Any], mode: str | None, options: Mapping[str, Any] | None
) -> Callable[[Any, Any], Callable[..., Any]]:
    """Return what ``torch.compile`` would hand graphs of static shapes to.

    Raises:
        RuntimeError: a mode or an option that there is not.
        InvalidBackend: a backend that there is not.
    """
    made: Any
    if backend == "inductor":
        made = torch._TorchCompileInductorWrapper(mode, options, False)
    else:
        made = torch._TorchCompileWrapper(backend, mode, options, False)
    compile_: Callable[[Any, Any], Callable[..., Any]] = made
    return compile_
