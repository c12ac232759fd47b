"""What compiles a graph, checked before minutes are spent on one: the backend, and its mode and options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import list_backends, lookup_backend
from torch._dynamo.exc import InvalidBackend
from torch._inductor import list_options

from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError, first_line


def check_compiler(backend: Any, mode: Any = None, options: Any = None) -> None:
    """Refuse what ``torch.compile`` would refuse when the graph is first called, or would not look at.

    Raises:
        InputError: a backend that torch does not know; a mode or an option that the backend does not have; both.
    """
    compiler = _lookup(backend)
    if mode is not None and not isinstance(mode, str):
        raise InputError(f"{checks.told('mode', mode)} must be a string, such as 'max-autotune', or None")
    if options is not None:
        checks.keywords("options", options)
    if mode is not None and options is not None:
        raise InputError(f"mode={mode!r} is given beside options={options!r}; torch.compile takes one of them")
    for name, value in (("mode", mode), ("options", options)):
        if not value or value == "default":
            continue
        if backend == "inductor":
            _check_inductor(name, value)
        elif not _takes(compiler, name):
            raise InputError(f"{checks.told(name, value)}: {checks.told('backend', backend)} has none; leave it out")


def check_works(backend: str, mode: str | None = None) -> None:
    """Refuse a backend that cannot compile here: what it needs may not be installed.

    Raises:
        InputError: it cannot, or :func:`check_compiler` refuses it. Inductor is taken at its word: it takes a while.
    """
    check_compiler(backend, mode)
    if backend in ("eager", "inductor"):
        return
    try:
        torch.compile(torch.neg, backend=backend, mode=mode, dynamic=False)(torch.ones(1))
    except Exception as error:
        reason = first_line(getattr(error, "inner_exception", error))
        raise InputError(f"backend={backend!r} cannot compile here: {reason}") from error


def _check_inductor(name: str, value: Any) -> None:
    known = {option.replace("-", "_") for option in list_options()}
    if name == "options" and (unknown := [key for key in value if key.replace("-", "_") not in known]):
        raise InputError(
            f"options has {unknown[0]!r}, which inductor does not; torch._inductor.list_options() names all"
        )
    try:
        torch.compile(nn.Identity(), backend="inductor", dynamic=False, **{name: value})  # compiles nothing yet
    except RuntimeError as error:
        raise InputError(f"{checks.told(name, value)}: {first_line(error)}") from error


def _lookup(backend: Any) -> Callable[..., Any]:
    """The function behind ``backend``."""
    if not isinstance(backend, str):
        if not callable(backend):
            raise InputError(
                f"{checks.told('backend', backend)} must be a name that torch.compile takes, or a function"
            )
        return _not_ours(backend)
    try:
        found = lookup_backend(backend)
    except InvalidBackend:
        known = ", ".join(sorted({"eager", *list_backends()}))
        raise InputError(f"backend={backend!r} is not known to torch.compile; it has {known}") from None
    except Exception as error:  # of a package that registers one, and lacks something
        raise InputError(f"backend={backend!r} cannot be loaded: {first_line(error)}") from error
    return _not_ours(found)


def _not_ours(compiler: Callable[..., Any]) -> Callable[..., Any]:
    if getattr(compiler, "__module__", "") == "bigain_fx.backend":
        raise InputError("backend='bigain' is what rewrites the graph; name what compiles it, such as 'inductor'")
    return compiler


def _takes(compiler: Callable[..., Any], name: str) -> bool:
    """Whether ``compiler`` looks at the keyword argument ``name``, as far as can be told."""
    try:
        parameters = inspect.signature(compiler).parameters.values()
    except (TypeError, ValueError):
        return True
    # Torch's own that take anything ignore it, such as "eager", or fail.
    anything = not str(getattr(compiler, "__module__", "")).startswith("torch.")
    return any(item.name == name or (anything and item.kind is item.VAR_KEYWORD) for item in parameters)
