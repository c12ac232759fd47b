"""Whether a model is still what it was: a look that costs next to nothing, at every call."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from operator import is_
from typing import Any

from torch._C._dynamo.guards import dict_version

from bigain_fx.model_state import HOOKS, ModelState
from bigain_fx.torch_internals import Versions, hooks_registered

_FEW = 16


class Watch:
    """Notice that something was written into a container of ``state``, or a class exchanged.

    What was written may be what was there before; :meth:`ModelState.same_objects` and then the facts tell. Dtypes,
    devices and shapes of tensors change without a trace: whoever compiles the graph guards them.

    Args:
        state: what the model is now.
        restless: identities of dicts that are written without being changed: their items are compared.
    """

    def __init__(self, state: ModelState, restless: frozenset[int] = frozenset()) -> None:
        self._state, self._compared = state, restless
        containers = [holder.container for holder in state.holders]
        dicts = [container for container in containers if isinstance(container, dict)]
        self._restless = [(items, dict(items)) for items in dicts if id(items) in restless]
        self._calm = [items for items in dicts if items and id(items) not in restless]
        self._versions, self._numbers = Versions(self._calm), list(map(dict_version, self._calm))
        # Most registries of a model are empty, and any() passes by an empty one. Those of hooks wait for a hook.
        hooks = {id(vars(module)[name]) for module in state.modules for name in HOOKS}
        empty = [items for items in dicts if not items and id(items) not in restless]
        self._empty = [items for items in empty if id(items) not in hooks]
        self._no_hooks = [items for items in empty if id(items) in hooks]
        self._hooks = hooks_registered()
        self._lists: list[Any] = [container for container in containers if not isinstance(container, dict)]
        self._members = gc.get_referents(*self._lists)

    def moved(self) -> bool:
        """Return whether something was written."""
        return (
            not self._versions.same()
            or any(self._empty)
            or list(map(type, self._state.modules)) != self._state.classes
            or (hooks_registered() != self._hooks and any(self._no_hooks))
            or not _identical(gc.get_referents(*self._lists), self._members)
            or any(
                not _identical(now, then) or not _identical(now.values(), then.values()) for now, then in self._restless
            )
        )

    def again(self) -> Watch:
        """Return another watch of the same state, which compares what was written though nothing changed.

        Where much was, a capture did it, and that is over.
        """
        written = {id(items) for items, number in zip(self._calm, self._numbers, strict=True)
                   if dict_version(items) != number}  # fmt: skip
        return Watch(self._state, frozenset(written if len(written) <= _FEW else ()) | self._compared)


def _identical(now: Iterable[object], then: Iterable[object]) -> bool:
    first, second = list(now), list(then)
    return len(first) == len(second) and all(map(is_, first, second))
