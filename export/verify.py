"""Does an ONNX file say what torch says? Its outputs against those of the graph it came from, given equal plans.

A plan is not continuous: where two similarities agree to the last bits, another summation order picks another token
(``docs/operators.md``, "Plan"). So torch's graph is run with the plans that ONNX Runtime made, and how far torch's own
plans agree with those is told apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from bigain_fx.export.functions import DOMAIN
from bigain_fx.export.interface import Interface
from bigain_fx.export.session import Session
from bigain_fx.passes.errors import ExportError
from bigain_fx.passes.pairs import pair
from bigain_fx.passes.sites import module_name

LIMITS = {"float32": 1e-3, "float16": 5e-2}
"""Relative L2 beyond which an output is wrong. What correct graphs show is far below: 1e-6 and 3e-3."""
PLAN, NEAREST = torch.ops.bigain.merge_plan.default, torch.ops.bigain.nearest_groups.default
DECIDING = {"LaplacianMergePlan": PLAN, "MergePlan": PLAN, "NearestGroups": NEAREST}
"""What picks tokens, and what it stands for in torch's graph."""
Picked = tuple[Tensor | None, ...]
"""The results of one of them; None where the file has no use for one."""
Place = tuple[str, Any]
"""A module, and which of :data:`DECIDING`."""
_TORCH = {onnx.TensorProto.INT64: torch.int64, onnx.TensorProto.FLOAT: torch.float32}


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
    given = [pair(tensor).cpu() for tensor in inputs]
    outputs = _run(path, given, [(port.shape, port.torch_dtype) for port in interface.outputs])
    for port, output in zip(interface.outputs, outputs, strict=True):
        if bad := int((~output.isfinite()).sum()):
            what = f"{bad} of {output.numel()} values of {port.name}"
            raise ExportError(f"{path.name}: {what} are nan or infinite; nothing is left")
    forced = _Forced(module, _picked(path, given))
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
    """Runs a graph with the given plans, by module, and counts where its own would be the same.

    The exporter joins equal plans into one node, so a module may have fewer than it has plan nodes here: one without is
    given the plan of an earlier node that had the same metric.
    """

    def __init__(self, module: fx.GraphModule, picked: Mapping[Place, Sequence[Picked]]) -> None:
        super().__init__(module)
        self._picked = {place: list(found) for place, found in picked.items()}
        self._todo = Counter((module_name(node), node.target) for node in module.graph.nodes)
        self._earlier: list[tuple[tuple[Any, ...], Picked]] = []
        self._shares, self._where = list[float](), ""

    @property
    def agreement(self) -> float | None:
        return sum(self._shares) / len(self._shares) if self._shares else None

    def run_node(self, n: fx.Node) -> Any:
        self._where = module_name(n)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().call_function(target, args, kwargs)
        if target not in DECIDING.values():
            return found
        given = self._given((self._where, target), args)
        forced = [own if item is None else item.to(own.device) for own, item in zip(found, given, strict=True)]
        if target is PLAN:
            self._shares.append(float((forced[0] == found[0]).double().mean()))
        return forced

    def _given(self, place: Place, args: tuple[Any, ...]) -> Picked:
        left, todo = self._picked.get(place, []), self._todo[place]
        self._todo[place] -= 1
        if len(left) < todo and (same := [picked for earlier, picked in self._earlier if _equal(earlier, args)]):
            return same[-1]
        if not left:
            raise ExportError(f"{self._where}: its plan is not in the file, nor an earlier one of an equal metric")
        self._earlier.append((args, left[0]))
        return left.pop(0)


def _equal(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(left, right, strict=True)
    )


def _run(path: Path, inputs: Sequence[Tensor], outputs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    return Session(path, ["CPUExecutionProvider"]).run(inputs, outputs)


def _picked(path: Path, inputs: Sequence[Tensor]) -> dict[Place, list[Picked]]:
    """What the file at ``path`` picks, by module, from a copy of it that gives it away."""
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in DECIDING]
    known = {info.name: info for info in model.graph.value_info}
    given = [known[name] for node in nodes for name in node.output if name in known]
    if not given:
        return {}
    del model.graph.output[:]
    model.graph.output.extend(given)
    types = [info.type.tensor_type for info in given]
    shapes = [([dim.dim_value for dim in of.shape.dim], _TORCH[of.elem_type]) for of in types]
    probe = path.with_name(f"{path.stem}-plans.onnx")
    try:
        onnx.save(model, probe)
        found = dict(zip([info.name for info in given], _run(probe, inputs, shapes), strict=True))
    finally:
        probe.unlink(missing_ok=True)
    picked: dict[Place, list[Picked]] = {}
    for node in nodes:
        where = {entry.key: entry.value for entry in node.metadata_props}
        place = where.get("module", ""), DECIDING[node.op_type]
        picked.setdefault(place, []).append(tuple(map(found.get, node.output)))
    return picked


def _deviation(name: str, output: Tensor, expected: Tensor) -> Deviation:
    difference = output.double() - expected.double()
    norm, error = float(expected.double().norm()), float(difference.norm())
    relative = error / norm if norm else math.inf if error else 0.0
    return Deviation(name, float(difference.abs().max()), relative)
