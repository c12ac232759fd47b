"""``enable`` and ``disable``: every denoiser of a diffusers pipeline, optimized where it is and put back."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from bigain_fx.denoiser import OptimizedDenoiser, optimize
from bigain_fx.passes.checks import told
from bigain_fx.passes.errors import BigainError, InputError
from bigain_fx.passes.methods import Method
from bigain_fx.report import Report

AnyMethod = Method | Iterable[Method] | None
Pipe = TypeVar("Pipe")


@dataclass(frozen=True)
class Summary:
    """What is enabled in a pipeline.

    Attributes:
        pipeline: its class name.
        reports: of each part that is enabled, by name: of the graph that was captured or used last; None where the part
            was not called yet.
    """

    pipeline: str
    reports: Mapping[str, Report | None]

    def __str__(self) -> str:
        lines = [
            f"{name}: {report or 'not called yet: it is captured and compiled at its first call'}"
            for name, report in self.reports.items()
        ]
        return "\n".join(
            lines or [f"{self.pipeline}: nothing is enabled; bigain_fx.enable(pipe, method=...) does that"]
        )


@dataclass(frozen=True)
class _Place:
    """Where a denoiser is kept: in an attribute of a pipeline, or in a list of modules."""

    holder: Any
    key: str | int

    @property
    def module(self) -> Any:
        return self.holder[self.key] if isinstance(self.key, int) else getattr(self.holder, self.key)

    def put(self, module: nn.Module) -> None:
        if isinstance(self.key, int):
            self.holder[self.key] = module
        else:
            setattr(self.holder, self.key, module)


def enable(pipe: Pipe, *, method: AnyMethod | Mapping[str, AnyMethod], **options: Any) -> Pipe:
    """Put :func:`bigain_fx.optimize` of every denoiser of ``pipe`` in its place, and return ``pipe``.

    A denoiser is each part whose ``forward`` takes a timestep: U-Nets, transformers, priors, ControlNets. What is
    enabled already is optimized anew, from its original. Parts are captured and compiled when they are first called.
    A pipeline that offloads whole models goes on to do so.

    Args:
        pipe: a diffusers pipeline.
        method: for all denoisers, as for ``optimize``; or for each by the name of its part, as in
            ``{"unet": LaplacianMerge(0.7)}``: then parts without a name here stay as they are.
        options: further keyword arguments of ``optimize``, such as ``select="auto"``.

    Raises:
        InputError: ``pipe`` is no pipeline, or has no denoiser, or none of a name in ``method``.
        BigainError: whatever ``optimize`` raises, with the name of the part; then ``pipe`` is as it was.
    """
    parts = _denoisers(pipe)
    if not parts:
        raise InputError(f"pipe={type(pipe).__name__} has no denoiser: no part of it takes a timestep")
    if isinstance(method, Mapping) and (unknown := [name for name in method if name not in map(_component, parts)]):
        there = ", ".join(dict.fromkeys(map(_component, parts)))
        raise InputError(f"method is for {unknown[0]!r}; the denoisers of {type(pipe).__name__} are {there}")
    made = {}
    with _hooks_anew(pipe):
        for name, places in parts.items():
            if isinstance(method, Mapping) and _component(name) not in method:
                continue
            chosen = method[_component(name)] if isinstance(method, Mapping) else method
            try:
                made[name] = optimize(_original(places[0].module), method=chosen, **options)
            except BigainError as error:
                raise type(error)(f"{name}: {error}") from error
        for name, module in made.items():
            for place in parts[name]:
                place.put(module)
    return pipe


def disable(pipe: Pipe) -> Pipe:
    """Put the original of every optimized denoiser of ``pipe`` back, and return ``pipe``; others stay as they are.

    Raises:
        InputError: ``pipe`` is no pipeline.
    """
    parts = _denoisers(pipe)
    with _hooks_anew(pipe):
        for place in (place for places in parts.values() for place in places):
            if isinstance(place.module, OptimizedDenoiser):
                place.put(place.module.original)
    return pipe


def summary(pipe: object) -> Summary:
    """Return what was done in each optimized denoiser of ``pipe``; as text, it is their reports.

    Raises:
        InputError: ``pipe`` is no pipeline.
    """
    enabled = {name: places[0].module for name, places in _denoisers(pipe).items()}
    return Summary(type(pipe).__name__, {name: _report(module) for name, module in enabled.items()
                                         if isinstance(module, OptimizedDenoiser)})  # fmt: skip


def _report(module: OptimizedDenoiser) -> Report | None:
    try:
        return module.report
    except InputError:
        return None


def _denoisers(pipe: object) -> dict[str, list[_Place]]:
    """Return where ``pipe``, and pipelines in it, keep each denoiser, by the name of the part.

    One of several ControlNets is a part of its own, such as ``controlnet.0``.
    """
    if isinstance(pipe, nn.Module) or not _is_pipeline(pipe):
        raise InputError(f"{told('pipe', pipe)} is no pipeline; for a denoiser there is bigain_fx.optimize")
    found: dict[int, tuple[str, list[_Place]]] = {}
    for prefix, holder in _pipelines(pipe).items():
        for part, component in holder.components.items():
            nets = getattr(component, "nets", None)
            places = {f"{prefix}{part}": _Place(holder, part)}
            if isinstance(nets, nn.ModuleList):
                places = {f"{prefix}{part}.{index}": _Place(nets, index) for index in range(len(nets))}
            for name, place in places.items():
                original = _original(place.module)
                if _takes_timestep(original):
                    found.setdefault(id(original), (name, []))[1].append(place)
    return dict(found.values())


def _pipelines(pipe: Any) -> dict[str, Any]:
    """Return ``pipe``, and the pipelines that it holds and calls, by what their parts' names begin with."""
    inner = {f"{name}.": value for name, value in vars(pipe).items() if _is_pipeline(value)}
    return {"": pipe} | inner


def _is_pipeline(value: object) -> bool:
    return not isinstance(value, nn.Module) and isinstance(getattr(value, "components", None), Mapping)


def _component(name: str) -> str:
    """Return the part of the pipeline that the denoiser ``name`` is, or is one of."""
    return re.sub(r"\.\d+$", "", name)


def _original(module: Any) -> Any:
    return module.original if isinstance(module, OptimizedDenoiser) else module


def _takes_timestep(module: object) -> bool:
    """Return whether ``module``, compiled or not, has a ``forward`` with a timestep."""
    if not isinstance(module, nn.Module):
        return False
    kind: Any = type(getattr(module, "_orig_mod", module))
    return any(name.startswith("timestep") for name in inspect.signature(kind.forward).parameters)


@contextmanager
def _hooks_anew(pipe: object) -> Iterator[None]:
    """While it is open, ``pipe`` offloads nothing; then as before, whatever its parts are by then."""
    offloading = [each for each in _pipelines(pipe).values() if getattr(each, "_all_hooks", None)]
    for each in offloading:
        each.remove_all_hooks()
    try:
        yield
    finally:
        for each in offloading:
            each.enable_model_cpu_offload(device=each._offload_device)
