"""From a denoiser and example inputs to what is exported: the rewritten graph, its inputs, its interface."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import bigain_fx
from bigain_fx.calls import CallBinder, as_calls, flat_tensors
from bigain_fx.denoiser import OptimizedDenoiser, optimize
from bigain_fx.deployed import DeployedDenoiser
from bigain_fx.export.interface import Interface, describe
from bigain_fx.families import GridHint
from bigain_fx.passes.checks import told
from bigain_fx.passes.errors import CaptureError, InputError
from bigain_fx.passes.grammar import parse
from bigain_fx.passes.images import as_grids, as_hint, tokens_on
from bigain_fx.passes.kv import TIMESTEP_INPUTS
from bigain_fx.passes.methods import Method, Methods
from bigain_fx.passes.where import where_text
from bigain_fx.report import Report

Example = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Traced:
    """A rewritten graph, the inputs that it was captured with, and what the file will say of it."""

    module: GraphModule
    inputs: list[Tensor]
    interface: Interface
    report: Report


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], methods: Methods, grid: GridHint,
    dtype: torch.dtype | None, versions: Mapping[str, str],
) -> Traced:  # fmt: skip
    """Capture ``model`` and rewrite it: what :func:`bigain_fx.optimize` would compile.

    Args:
        model, methods, grid: as for :func:`bigain_fx.optimize`.
        args, kwargs: example inputs; floating ones are cast to ``dtype``, a timestep to float32.
        versions: what the interface names beside ours and torch's.

    Raises:
        BigainError: what :func:`bigain_fx.optimize` raises.
    """
    fast = optimize(model, method=methods, backend="eager", grid=grid)
    binder = CallBinder(model)
    arguments, _ = binder.bind(args, kwargs)
    given = pytree.tree_map_only(Tensor, lambda tensor: _to(tensor, dtype), arguments)
    steps = {name: value for name, value in arguments.items() if name in TIMESTEP_INPUTS and isinstance(value, Tensor)}
    arguments = given | {name: value.float() for name, value in steps.items()}
    try:
        prepared = fast.prepare(**arguments)
    except CaptureError:
        if all(value.is_floating_point() for value in steps.values()):
            raise
        arguments = given  # perhaps the integer is an index
        prepared = fast.prepare(**arguments)
    module = prepared.run
    assert isinstance(module, GraphModule)
    outputs = [node.meta["val"] for node in module.graph.output_node().args[0]]  # type: ignore[union-attr]
    grids = [as_grids(site.grid) for site in prepared.report.sites if site.grid]
    interface = describe(
        model, binder.signature, arguments, prepared.out_spec, outputs, _text(methods),
        as_hint(max(grids, key=tokens_on)) if grids else None,
        {"bigain_fx": bigain_fx.__version__, "torch": torch.__version__, **versions},
    )  # fmt: skip
    inputs = [tensor.contiguous() for tensor in flat_tensors(arguments)]
    return Traced(module, inputs, interface, prepared.report)


def _to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def cast(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """``model`` itself if its weights have ``dtype``, else a copy of it that does."""
    held = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if dtype is None or held <= {dtype}:
        return model
    return nn.Module.to(copy.deepcopy(model), dtype)


def _text(methods: Methods) -> str:
    """In the text grammar if that tells all of it, else as Python."""
    text = "+".join(map(str, methods)) or "dense"
    return text if parse(text) == methods else ", ".join(map(_as_python, methods))


def _as_python(method: Method) -> str:
    """A call that makes ``method``, without what is its default."""
    values = {item.name: getattr(method, item.name) for item in fields(method)
              if getattr(method, item.name) != item.default}  # fmt: skip
    given = [f"{name}={where_text(value) if callable(value) else repr(value)}" for name, value in values.items()]
    return f"{type(method).__name__}({', '.join(given)})"


def examples_of(
    args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None, example_inputs: Sequence[Example] | None
) -> list[Example]:
    """The example inputs as a list of ``(args, kwargs)``.

    Raises:
        InputError: they are given twice, or are none.
    """
    if example_inputs is None:
        return as_calls([(() if args is None else args, {} if kwargs is None else kwargs)])
    if not (args is None or (isinstance(args, tuple) and not args)) or kwargs:
        raise InputError("example_inputs is given beside args or kwargs; give one of them")
    return as_calls(example_inputs)


def check(model: object, dtype: object) -> None:
    """Refuse what cannot be exported.

    Raises:
        InputError: ``model`` is no module, or one of ours; ``dtype`` is no floating dtype.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model={type(model).__name__} is not an nn.Module; pass the denoiser, such as pipe.unet")
    if isinstance(model, OptimizedDenoiser | DeployedDenoiser):
        raise InputError(f"model is a {type(model).__name__}; export the original")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"{told('dtype', dtype)} must be a floating torch.dtype, such as torch.float16")


def digest(model: nn.Module) -> str:
    """Of the weights: graphs of different sizes may only be used together if they have the same."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
