"""From a model and the arguments of one call to a graph that can be run: captured, rewritten, compiled when called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from bigain_fx.calls import check_inputs, flat_tensors
from bigain_fx.capture import Captured, capture
from bigain_fx.hooks import check_hooks, traced_hooks
from bigain_fx.model_state import some
from bigain_fx.passes.errors import CaptureError, InputError
from bigain_fx.passes.images import Hint
from bigain_fx.passes.methods import Methods
from bigain_fx.passes.pipeline import Rewritten
from bigain_fx.report import Report
from bigain_fx.settings import Settings

log = logging.getLogger("bigain_fx")


@dataclass(frozen=True)
class Prepared:
    """One captured and rewritten graph, for one input signature.

    Attributes:
        graph: takes the flat tensor inputs.
        run: the graph itself with the backend ``"eager"``, else what compiles it.
        out_spec: the pytree of the model's output.
        report: what was done to its attentions.
        numbers: paths of the model's float attributes that are inputs too, behind the tensors.
    """

    graph: GraphModule
    run: Callable[..., Any]
    out_spec: pytree.TreeSpec
    report: Report
    numbers: tuple[str, ...] = ()


def _check_numbers(
    model: nn.Module,
    captured: Captured,
    arguments: Mapping[str, Any],
    numbers: Mapping[str, Tensor],
    plain: Mapping[str, Any],
) -> None:
    """Refuse a graph with numbers as inputs that is not the model: some do other things with a tensor."""
    with torch.no_grad():
        expected = _tensors(model(**plain))
        found = _tensors(captured.module(*flat_tensors(arguments), *(numbers[path] for path in captured.numbers)))
    for one, other in zip(expected, found, strict=True):
        tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else 3e-2
        if not one.is_meta and not (one - other).double().norm() <= tolerance * one.double().norm():
            raise CaptureError("forward does something else with a tensor than with the number in it")


def _tensors(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def trace(
    model: nn.Module,
    methods: Methods,
    settings: Settings,
    arguments: Mapping[str, Any],
    grid: Hint | None,
    numbers: Mapping[str, Tensor] | None = None,
    plain: Mapping[str, Any] | None = None,
) -> tuple[Captured, Rewritten]:
    """Capture ``model`` for ``arguments``, and rewrite the graph by ``methods``.

    Args:
        model: the original.
        methods: timestep units filled in.
        settings: how.
        arguments: canonical keyword arguments.
        grid: of the image tokens, where it is known.
        numbers: float attributes of the model that become inputs, as for :func:`bigain_fx.capture.capture`.
        plain: the arguments with numbers in the places of tensors that were made of them; the graph must give for
            these, and for ``numbers``, what the model gives.

    Raises:
        BigainError: as for :func:`bigain_fx.optimize`.
    """
    name = type(model).__name__
    if model.training:
        raise InputError(f"{name} is in train mode; call model.eval() first")
    check_hooks(model)
    check_inputs(model, arguments)
    captured = capture(model, arguments, numbers or {})
    if plain is not None:
        _check_numbers(model, captured, arguments, numbers or {}, plain)
    if hooked := traced_hooks(model):
        log.warning("%s: forward hooks are part of its graph, and are not called again: %s", name, some(hooked))
    return captured, settings.rewrite(captured.module, methods, grid, name)


def prepare(
    model: nn.Module,
    methods: Methods,
    settings: Settings,
    arguments: Mapping[str, Any],
    grid: Hint | None,
    numbers: Mapping[str, Tensor] | None = None,
    check: Callable[[], None] = lambda: None,
    plain: Mapping[str, Any] | None = None,
) -> Prepared:
    """Return what runs ``model``, for arguments of the kinds of these; it is compiled when first called.

    Arguments and errors are those of :func:`trace`; ``check`` is called before the graph is compiled, and compiled
    again.
    """
    captured, rewritten = trace(model, methods, settings, arguments, grid, numbers, plain)
    report = Report.of(type(model).__name__, methods, rewritten)
    run = settings.compile(rewritten.module, check)
    return Prepared(rewritten.module, run, captured.out_spec, report, captured.numbers)
