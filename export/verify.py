"""Does an ONNX file say what torch says? Its outputs against those of the graph it came from, given equal plans.

A plan is not continuous: where two similarities agree to the last bits, another summation order picks another token
(``docs/operators.md``, "Plan"). So torch's graph is run with the plans that ONNX Runtime made, and how far torch's own
plans agree with those is told apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, fx

from bigain_fx.export.functions import DOMAIN
from bigain_fx.export.interface import Interface
from bigain_fx.export.session import Session
from bigain_fx.passes.errors import ExportError

LIMITS = {"float32": 1e-3, "float16": 5e-2}
"""Relative L2 beyond which an output is wrong. What correct graphs show is far below: 1e-6 and 3e-3."""
PLANS = ("LaplacianMergePlan", "MergePlan")


@dataclass(frozen=True)
class Deviation:
    """How far one output is from torch's.

    Attributes:
        name: of the output.
        max_abs: largest absolute difference.
        relative_l2: ``||onnx - torch|| / ||torch||``.
    """

    name: str
    max_abs: float
    relative_l2: float

    @property
    def db(self) -> float | None:
        """Signal to error in dB; None where there is no error."""
        return -20 * math.log10(self.relative_l2) if self.relative_l2 else None


@dataclass(frozen=True)
class Verification:
    """Deviations of all outputs given equal plans, and the share of tokens whose group torch would choose too."""

    deviations: tuple[Deviation, ...]
    plan_agreement: float | None


def verify(path: Path, module: fx.GraphModule, inputs: Sequence[Tensor], interface: Interface) -> Verification:
    """Run the file at ``path`` on the CPU and compare it with ``module``, the graph that it was exported from.

    Args:
        path: the file; a second graph is written beside it and removed again.
        module: takes ``inputs`` by position.
        inputs: one tensor per input of ``interface``.

    Raises:
        ExportError: an output that is not finite, or further from torch's than :data:`LIMITS`.
    """
    given = [tensor.cpu() for tensor in inputs]
    outputs = _run(path, given, [(port.shape, port.torch_dtype) for port in interface.outputs])
    for port, output in zip(interface.outputs, outputs, strict=True):
        if bad := int((~output.isfinite()).sum()):
            what = f"{bad} of {output.numel()} values of {port.name}"
            raise ExportError(f"{path.name}: {what} are nan or infinite; nothing is left")
    forced = _Forced(module, _plans(path, given))
    with torch.no_grad():
        expected = [tensor.cpu() for tensor in forced.run(*inputs)]
    deviations = tuple(map(_deviation, [port.name for port in interface.outputs], outputs, expected))
    for port, deviation in zip(interface.outputs, deviations, strict=True):
        limit = LIMITS.get(port.dtype, 0.0)
        if not deviation.relative_l2 <= limit:
            raise ExportError(
                f"{path.name}: {port.name} deviates from torch by {deviation.relative_l2:.1e} (relative L2, given "
                f"equal plans), more than {limit:g} for {port.dtype}; nothing is left"
            )
    return Verification(deviations, forced.agreement)


class _Forced(fx.Interpreter):
    """Runs a graph with the given plans, and counts where its own would be the same."""

    def __init__(self, module: fx.GraphModule, plans: Sequence[Tensor]) -> None:
        super().__init__(module)
        self._plans, self._shares = iter(plans), list[float]()

    @property
    def agreement(self) -> float | None:
        return sum(self._shares) / len(self._shares) if self._shares else None

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().call_function(target, args, kwargs)
        if target is not torch.ops.bigain.merge_plan.default:
            return found
        forced = next(self._plans).to(found[0].device)
        self._shares.append(float((forced == found[0]).double().mean()))
        return forced, found[1]


def _run(path: Path, inputs: Sequence[Tensor], outputs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every constant that it does not fold
    return Session(path, ["CPUExecutionProvider"], options).run(inputs, outputs)


def _plans(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The plans that the file at ``path`` makes, in graph order, from a copy of it that gives them away."""
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in PLANS]
    if not nodes:
        return []
    shapes = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in model.graph.value_info}
    names = [node.output[0] for node in nodes]
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shapes[name]) for name in names
    )
    probe = path.with_name(f"{path.stem}-plans.onnx")
    try:
        onnx.save(model, probe)
        return _run(probe, inputs, [(shapes[name], torch.int64) for name in names])
    finally:
        probe.unlink(missing_ok=True)


def _deviation(name: str, output: Tensor, expected: Tensor) -> Deviation:
    difference = output.double() - expected.double()
    norm = float(expected.double().norm())
    return Deviation(name, float(difference.abs().max()), float(difference.norm()) / norm if norm else math.inf)
