"""The private names of torch that calls to a denoiser rely on, seen in torch 2.11 to 2.13."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.utils.hooks
from torch import Tensor
from torch._dynamo import eval_frame
from torch._dynamo.convert_frame import compile_lock


class Versions:
    """Tell in no time whether something was written into one of many dicts.

    Every write gives a dict another version, which Dynamo's guards compare: ten nanoseconds a dict.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]]) -> None:
        from torch._C._dynamo.guards import RootGuardManager
        from torch._dynamo.guards import GuardManagerType

        self._dicts = tuple(dicts)
        self._root = RootGuardManager()
        for index, items in enumerate(self._dicts):
            guard: Any = self._root.tuple_getitem_manager(index, "", items, GuardManagerType.GUARD_MANAGER)
            try:
                guard.add_dict_version_guard(items, [""], None)
            except TypeError:  # not every torch wants a user's stack
                guard.add_dict_version_guard(items, [""])

    def same(self) -> bool:
        """Return whether nothing was written since this was made."""
        return bool(self._root.check(self._dicts))


class Kinds:
    """Tell whether compiled code that was made for ``tensors`` may run: whether Dynamo's guards would hold.

    They compare the types, dispatch keys, dtypes, devices, sizes and strides of tensors, that each is another one, and
    what torch does in this thread: whether it records gradients, autocasts, and so on.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards

        sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
        strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
        self._tensors = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._state = GlobalStateGuard()

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these tensors, and the state of torch, are of the kinds that they were."""
        return bool(self._state.check() and _plainly_called() and self._tensors.check(*tensors))


def _plainly_called() -> bool:
    """Return whether no mode looks at calls, and nobody asked for eager code."""
    modes = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    return not modes and eval_frame._stance.stance == "default"


def hooks_registered() -> int:
    """Return how many hooks of modules and tensors were ever registered in this process."""
    return torch.utils.hooks.RemovableHandle.next_id


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
