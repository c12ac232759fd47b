"""From a rewritten graph to an ONNX model in which the operators are functions of the domain ``bigain``.

::

    torch.ops.bigain.merge(x, assign, groups)      ->      bigain::Merge(x, assign) <groups, block>

torch's exporter inlines every function that it is given. So each operator is exported as one symbolic node, and the
bodies of :mod:`bigain_fx.export.functions` are attached afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.onnx import ops as symbolic_ops

from bigain_fx.export.functions import DOMAIN, FUNCTIONS, VERSION
from bigain_fx.export.retrace import quiet, retrace
from bigain_fx.passes.arguments import SDPA
from bigain_fx.passes.destinations import rule_of
from bigain_fx.passes.errors import ExportError, first_line
from bigain_fx.passes.ops import downsampled_grid
from bigain_fx.passes.ops.plan import NEAREST, SHARPNESS
from bigain_fx.passes.sites import module_name

aten, bigain = torch.ops.aten, torch.ops.bigain
OPSETS = range(18, 24)
_JOINS = (aten.cat.default, aten.concat.default, aten.stack.default, aten.hstack.default, aten.vstack.default)
ATTENTIONS = ("MultiHeadAttention", "standard")


def to_onnx(
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
    attention: str,
) -> ir.Model:
    """Translate ``module``, which takes ``inputs`` by position and returns a sequence of tensors.

    Args:
        module: a graph as :func:`bigain_fx.passes.pipeline.rewrite` returns it.
        inputs: one tensor per input, of the static shapes and dtypes of the graph; complex ones become real pairs.
        input_names, output_names: of the ONNX graph's.
        opset: of the standard operators, 18 to 23.
        attention: ``"MultiHeadAttention"`` makes one ``com.microsoft`` node of every unmasked attention;
            ``"standard"`` leaves it to the opset: ``Attention`` from 23 on, ``MatMul`` and ``Softmax`` below.

    Raises:
        ExportError: an operator without an ONNX form; or torch's exporter cannot translate the graph (chained).
    """
    for node in module.graph.nodes:
        ours = getattr(node.target, "namespace", "") == "bigain" and not rule_of(node.target)
        if ours and node.target not in _TABLE:
            raise ExportError(f"{node.target} has no ONNX form; the method must be no BlockPool")
        if node.target is SDPA and node.args[0].meta["val"].dtype == torch.bfloat16:
            raise ExportError(
                f"{module_name(node)} attends in bfloat16 whatever the weights are, and ONNX Runtime has no kernel for "
                "that on the CPU; use export_package"
            )
    try:
        with torch.no_grad(), quiet():
            program = retrace(module, inputs, lambda graph: _Symbolic(graph, attention))
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=list(input_names),
                output_names=list(output_names), optimize=True, verbose=False,
            )  # fmt: skip
    except ExportError:
        raise
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise ExportError(f"torch.onnx cannot export the graph at opset {opset}: {reason}") from error
    assert exported is not None
    model = exported.model
    _clean(model)
    _attach(model)
    return model


class _Symbolic(nn.Module):
    """Runs a graph with each operator of ours, and each plain attention, as one symbolic ONNX node."""

    def __init__(self, module: fx.GraphModule, attention: str) -> None:
        super().__init__()
        self.module = module
        self._table = dict(_TABLE)
        if attention == "MultiHeadAttention":
            self._table[SDPA] = _attention

    def forward(self, *inputs: Tensor) -> Any:
        """The flat outputs for the flat inputs."""
        return _Interpreter(self.module, self._table).run(*inputs)


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__(module)
        self._table, self._where = table, dict[str, str]()

    def run_node(self, n: fx.Node) -> Any:
        self._where = {"module": module_name(n)}
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if rule := rule_of(target):  # a rule is made of what torch's exporter knows
            metric, grid, cell, *values = args
            return rule(*values).positions(metric, grid, cell)
        emit = self._table.get(target)
        found = emit(self._where, *args, **kwargs) if emit else NotImplemented
        return super().call_function(target, args, kwargs) if found is NotImplemented else found


def _merge_plan(
    where: dict[str, str],
    metric: Tensor,
    grid: list[int],
    cell: list[int],
    merged: int,
    position: Tensor | None = None,
    window: list[int] | None = None,
) -> Sequence[Tensor]:
    batch, tokens, _ = metric.shape
    name, inputs = "LaplacianMergePlan", [metric]
    if position is not None:
        name, inputs = "MergePlan", [metric, position if position.ndim == 2 else position[None]]
    return symbolic_ops.symbolic_multi_out(
        f"{DOMAIN}::{name}", inputs,
        {"grid": list(grid), "cell": list(cell), "window": list(window or grid), "merged": merged},
        dtypes=[torch.int64, torch.int64], shapes=[(batch, tokens), (batch, tokens - merged)], version=VERSION,
        metadata_props=where,
    )  # fmt: skip


def _merge(where: dict[str, str], x: Tensor, assign: Tensor, groups: int) -> Tensor:
    attributes = {"groups": groups, "block": _block(x.shape[1])}
    return _emit("Merge", [x, assign], attributes, x.dtype, (x.shape[0], groups, x.shape[2]), where)


def _block(tokens: int) -> int:
    """The divisor of ``tokens`` next to its square root: prefix sums over blocks and within them are as short."""
    return max(size for size in range(1, math.isqrt(tokens) + 1) if tokens % size == 0)


def _unmerge(where: dict[str, str], y: Tensor, assign: Tensor) -> Tensor:
    return _emit("Unmerge", [y, assign], {}, y.dtype, (*assign.shape, y.shape[2]), where)


def _group_sizes(where: dict[str, str], assign: Tensor, groups: int) -> Tensor:
    return _emit("GroupSizes", [assign], {"groups": groups}, torch.float32, (assign.shape[0], groups), where)


def _nearest_groups(where: dict[str, str], metric: Tensor, assign: Tensor, rep: Tensor) -> Sequence[Tensor]:
    (batch, tokens), groups = assign.shape, rep.shape[1]
    count = min(NEAREST, groups)
    attributes: dict[str, Any] = {
        "groups": groups, "block": _block(tokens), "count": count, "sharpness": SHARPNESS
    }  # fmt: skip
    return symbolic_ops.symbolic_multi_out(
        f"{DOMAIN}::NearestGroups", [metric, assign, rep], attributes, dtypes=[torch.int64, torch.float32],
        shapes=[(batch, count, tokens), (batch, count - 1, tokens)], version=VERSION, metadata_props=where,
    )  # fmt: skip


def _blend(where: dict[str, str], y: Tensor, near: Tensor, weight: Tensor) -> Tensor:
    return _emit("Blend", [y, near, weight], {}, y.dtype, (near.shape[0], near.shape[2], y.shape[2]), where)


def _kv_downsample(where: dict[str, str], x: Tensor, alpha: float | Tensor, grid: list[int], factor: int) -> Tensor:
    weight = alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=torch.float32)
    name = "KVDownsampleCut" if any(side % factor for side in grid) else "KVDownsample"
    shape = (x.shape[0], math.prod(downsampled_grid(grid, factor)), x.shape[2])
    return _emit(name, [x, weight], {"grid": list(grid), "factor": factor}, x.dtype, shape, where)


def _linear_alpha(
    where: dict[str, str], timestep: Tensor, batch: int, noisy: float, clean: float, t_noisy: float, t_clean: float
) -> Tensor:
    attributes = {"batch": batch, "noisy": noisy, "clean": clean, "t_noisy": t_noisy, "t_clean": t_clean}
    return _emit("LinearAlpha", [timestep], attributes, torch.float32, (batch,), where)


def _attention(
    where: dict[str, str], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """``com.microsoft::MultiHeadAttention`` of ``(B, H, S, D)`` operands, not masked, causal, grouped or double."""
    if mask is not None or causal or q.ndim != 4 or q.shape[:2] != k.shape[:2] or q.dtype == torch.float64:
        return NotImplemented
    heads = q.shape[1]
    flat = [operand.transpose(1, 2).flatten(2) for operand in (q, k, v)]
    attributes = {"num_heads": heads} | ({} if scale is None else {"scale": scale})
    shape = (*flat[0].shape[:2], flat[2].shape[2])
    out = _emit("MultiHeadAttention", flat, attributes, q.dtype, shape, where, "com.microsoft")
    return out.unflatten(2, (heads, -1)).transpose(1, 2)


def _promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]


def _join(target: Any, where: dict[str, str], tensors: Sequence[Tensor], *dim: int, **dims: int) -> Any:
    """Torch promotes what it concatenates, ``Concat`` does not, and the exporter leaves that to it (2.13)."""
    return target(_promoted(tensors), *dim, **dims)


def _einsum(where: dict[str, str], equation: str, tensors: Sequence[Tensor], *, path: Any = None) -> Tensor:
    """As :func:`_join`: an outer product promotes."""
    return torch.einsum(equation, _promoted(tensors))


def _squeeze(where: dict[str, str], x: Tensor, dim: int) -> Tensor:
    """Torch keeps a dimension that is not 1, ``Squeeze`` refuses it, and the exporter leaves that to it (2.13)."""
    return x.squeeze(dim) if x.shape[dim] == 1 else x


def _where(where: dict[str, str], condition: Tensor, chosen: Tensor | bool, other: Tensor | bool) -> Any:
    """ONNX Runtime has no ``Where`` of booleans."""
    if any(getattr(value, "dtype", type(value)) not in (torch.bool, bool) for value in (chosen, other)):
        return NotImplemented
    return (condition & chosen) | (~condition & other)


def _masked_fill(where: dict[str, str], x: Tensor, mask: Tensor, value: Tensor | float) -> Any:
    """As :func:`_where`."""
    return _where(where, mask, value if isinstance(value, Tensor) else bool(value), x)


def _emit(
    name: str, inputs: list[Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, shape: Sequence[int],
    where: dict[str, str], domain: str = DOMAIN,
) -> Tensor:  # fmt: skip
    return symbolic_ops.symbolic(
        f"{domain}::{name}", inputs, dict(attributes), dtype=dtype, shape=shape, version=VERSION, metadata_props=where
    )


_TABLE: dict[Any, Callable[..., Any]] = {
    bigain.merge_plan.default: _merge_plan,
    bigain.merge.default: _merge,
    bigain.unmerge.default: _unmerge,
    bigain.group_sizes.default: _group_sizes,
    bigain.nearest_groups.default: _nearest_groups,
    bigain.blend.default: _blend,
    bigain.kv_downsample.default: _kv_downsample,
    bigain.kv_downsample.Tensor: _kv_downsample,
    bigain.linear_alpha.default: _linear_alpha,
    **{target: functools.partial(_join, target) for target in _JOINS},
    aten.einsum.default: _einsum,
    aten.squeeze.dim: _squeeze,
    **dict.fromkeys((aten.where.self, aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
}


def _clean(model: ir.Model) -> None:
    """Drop torch's stack traces, which hold paths of the machine; name the weights as the model does."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        module = node.metadata_props.get("module")
        node.metadata_props.clear()
        if module:
            node.metadata_props["module"] = module
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    taken = {value.name for value in (*model.graph.inputs, *(out for node in model.graph for out in node.outputs))}
    for name in list(model.graph.initializers):
        if name.startswith("module.") and name.removeprefix("module.") not in taken | set(model.graph.initializers):
            value = model.graph.initializers.pop(name)
            value.name = name.removeprefix("module.")
            model.graph.register_initializer(value)


def _attach(model: ir.Model) -> None:
    """Attach the functions that the graph calls, and those that these call."""
    known = {function.name: function for function in FUNCTIONS}
    wanted = [node.op_type for node in model.graph if node.domain == DOMAIN]
    attached: dict[str, ir.Function] = {}
    while wanted:
        name = wanted.pop()
        if name not in attached:
            function = ir.serde.deserialize_function(known[name].to_function_proto())
            # The bodies are valid at every opset of OPSETS; a model has one.
            function.opset_imports[""] = model.opset_imports[""]
            attached[name] = function
            wanted += [node.op_type for node in function if node.domain == DOMAIN]
    for name in known:
        if name in attached:
            model.functions[attached[name].identifier()] = attached[name]
    if any(node.domain == "com.microsoft" for node in model.graph):
        model.opset_imports["com.microsoft"] = 1
