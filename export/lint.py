"""A placement lint that needs no GPU: which nodes of an ONNX file would not stay on an execution provider.

It follows what ONNX Runtime does with a file: calls of the file's own functions are replaced by their bodies, what
depends on constants alone is computed when the file is loaded, an operator that has no kernel anywhere but a function
body in its definition is replaced by that body, and of the rest every node needs a kernel of the provider for its
version and dtypes. That ONNX Runtime also *chooses* to run small shape arithmetic on the CPU is not reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto, helper
from onnx.defs import OpSchema, SchemaError

from bigain_fx.export.placement import CLAIMED_BY_CPU, CUDA, KERNELS, OPSETS, RELEASE, misfit, refusal
from bigain_fx.passes.errors import ExportError, InputError

RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
SMALL = 1024  # bytes of a tensor that may be a shape; larger ones are weights, whose values no type depends on


@dataclass(frozen=True)
class Finding:
    """A node that the provider would not keep.

    ``node`` is its name in the file, after the names of the calls of functions that it is in ("merge_3/one_hot");
    ``op`` its operator with the domain ("ai.onnx::TopK"); ``reason`` one line.
    """

    node: str
    op: str
    reason: str


@dataclass
class _Scope:
    """What is known of the values of one graph or function body: their types, and which are constants."""

    opsets: dict[str, int]
    types: dict[str, TypeProto] = field(default_factory=dict)
    constants: set[str] = field(default_factory=lambda: {""})  # an input that is left out is as good as one

    def dtype(self, value: str) -> str | None:
        """Return the dtype name of a tensor ("float16"), or None where it is not known."""
        kind = self.types.get(value, TypeProto()).tensor_type.elem_type
        name = onnx.TensorProto.DataType.Name(kind).lower()
        return {"undefined": None, "float": "float32", "double": "float64"}.get(name, name)

    def is_static(self, value: str) -> bool:
        """Whether every dimension of a value is known."""
        tensor = self.types.get(value, TypeProto()).tensor_type
        return tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)

    def learn(self, graph: GraphProto) -> None:
        """Take over the types that a graph states for its values."""
        for values in (graph.value_info, graph.input, graph.output):
            self.types.update({value.name: value.type for value in values if value.type.WhichOneof("value")})
        for tensor in graph.initializer:
            self.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))


def lint(path: Path, provider: str = CUDA) -> tuple[Finding, ...]:
    """Return the nodes of an ONNX file that ``provider`` would not keep, in the order of the graph.

    The file's external data need not be there. A dtype that cannot be inferred is not checked.

    Raises:
        InputError: There is no table of the provider's kernels.
        ExportError: ``path`` is missing, cut short, malformed or no ONNX file, or its opset is outside of the table.
    """
    if provider not in KERNELS:
        raise InputError(f"provider={provider!r}: there is a table of kernels for {', '.join(KERNELS)} only")
    model = _read(Path(path))
    opsets = {_domain(entry.domain): entry.version for entry in model.opset_import}
    if opsets.get("ai.onnx") not in OPSETS:
        found = f"opset {opsets.get('ai.onnx')}, the table of kernels holds {OPSETS.start} to {OPSETS.stop - 1}"
        raise ExportError(f"path={str(path)!r}: {found}")
    try:
        return tuple(_Linter(provider, model).findings(_Scope(opsets)))
    except Exception as error:  # of whatever kind: the walk trusts what a field says
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ExportError(f"path={str(path)!r}: the graph is malformed: {said}") from error


def _read(path: Path) -> ModelProto:
    """Return the model in a file, without the values of its weights."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ExportError(f"path={str(path)!r}: cannot be read: {getattr(error, 'strerror', error)}") from error
    try:
        model: ModelProto = ModelProto.FromString(data)
    except Exception as error:  # protobuf's DecodeError; its package is not one that we import
        raise ExportError(f"path={str(path)!r}: cut short, or no ONNX file") from error
    if not model.graph.node or not model.opset_import:
        raise ExportError(f"path={str(path)!r}: cut short, or no ONNX file: it holds no graph")
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > SMALL:
            tensor.ClearField("raw_data")
    return model


def _domain(name: str) -> str:
    return name or "ai.onnx"


def _operator(node: NodeProto) -> str:
    return f"{_domain(node.domain)}::{node.op_type}"


def _schema(node: NodeProto, opsets: Mapping[str, int]) -> OpSchema | None:
    domain = _domain(node.domain)
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(domain, 1), "" if domain == "ai.onnx" else domain)
    except SchemaError:
        return None


def _attributes(node: NodeProto) -> dict[str, object]:
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH]


def _formal(schema: OpSchema, node: NodeProto) -> Iterator[tuple[OpSchema.FormalParameter, str]]:
    """Yield each input and output of a node with the parameter it is given for; the last parameter may be repeated."""
    for parameters, values in ((schema.inputs, node.input), (schema.outputs, node.output)):
        for position, value in enumerate(values[: len(values) if parameters else 0]):
            yield parameters[min(position, len(parameters) - 1)], value


@dataclass(frozen=True)
class _Linter:
    """The walk over one file."""

    provider: str
    model: ModelProto

    def findings(self, scope: _Scope) -> Iterator[Finding]:
        """Yield the findings in the main graph."""
        graph = self._inferred(self.model, scope)
        overridable = {value.name for value in graph.input}
        scope.constants.update(tensor.name for tensor in graph.initializer if tensor.name not in overridable)
        yield from self._graph(graph, scope)

    def _inferred(self, model: ModelProto, scope: _Scope) -> GraphProto:
        """Return the graph of ``model`` after type inference, its types added to ``scope``."""
        try:
            graph = onnx.shape_inference.infer_shapes(model).graph
        except (RuntimeError, ValueError, onnx.shape_inference.InferenceError):
            graph = model.graph  # its own value_info, and what _propagate finds, are left
        scope.learn(graph)
        return graph

    def _graph(self, graph: GraphProto, scope: _Scope) -> Iterator[Finding]:
        for node in graph.node:
            body = self._function(node)
            if body is not None:
                name = node.name or node.output[0]
                for finding in self._call(node, body, scope):
                    yield replace(finding, node=f"{name}/{finding.node}")
            elif self._folds(node, scope):
                scope.constants.update(node.output)
            else:
                yield from self._runtime(node, scope)
            self._propagate(node, scope)

    def _function(self, node: NodeProto) -> FunctionProto | None:
        """Return the file's own function that a node calls, or None."""
        functions: Iterable[FunctionProto] = self.model.functions
        called = (node.domain, node.op_type, node.overload)
        return next((each for each in functions if (each.domain, each.name, each.overload) == called), None)

    def _call(self, node: NodeProto, function: FunctionProto, scope: _Scope) -> Iterator[Finding]:
        """Yield the findings in the body of a function, and carry over what is learnt of its outputs.

        As in ONNX Runtime, operators are of the file's opset, even where the body was written for another one.
        """
        inner = _Scope({_domain(entry.domain): entry.version for entry in function.opset_import} | scope.opsets)
        given = dict(zip(function.input, node.input, strict=False))
        inner.constants.update(name for name in function.input if given.get(name, "") in scope.constants)
        typed = {name: scope.types[value] for name, value in given.items() if value in scope.types}
        inputs = [ValueInfoProto(name=name, type=kind) for name, kind in typed.items()]
        graph = helper.make_graph(
            _bound(function, node), "body", inputs, [ValueInfoProto(name=n) for n in function.output]
        )
        imports = [helper.make_opsetid(name, version) for name, version in inner.opsets.items()]
        model = helper.make_model(graph, opset_imports=imports, functions=self.model.functions)
        yield from self._graph(self._inferred(model, inner), inner)
        for formal, actual in zip(function.output, node.output, strict=False):
            if formal in inner.types:
                scope.types.setdefault(actual, inner.types[formal])
            if formal in inner.constants:
                scope.constants.add(actual)

    def _folds(self, node: NodeProto, scope: _Scope) -> bool:
        """Whether the outputs of a node are known when the file is loaded."""
        known = _domain(node.domain) == "ai.onnx" or _operator(node) in KERNELS[self.provider]
        if not known or node.op_type in RANDOM or _subgraphs(node):
            return False
        if node.op_type == "Shape" and scope.is_static(node.input[0]):
            return True
        return node.op_type == "Constant" or (bool(node.input) and scope.constants.issuperset(node.input))

    def _runtime(self, node: NodeProto, scope: _Scope) -> Iterator[Finding]:
        """Yield the finding of a node that runs with each step, and those in its subgraphs."""
        reason = self._reason(node, scope)
        if reason is not None:
            yield Finding(node.name or node.output[0], _operator(node), reason)
        for graph in _subgraphs(node):
            inner = _Scope(scope.opsets, dict(scope.types), set(scope.constants))
            inner.constants.update(tensor.name for tensor in graph.initializer)
            inner.learn(graph)
            yield from self._graph(graph, inner)

    def _reason(self, node: NodeProto, scope: _Scope) -> str | None:
        operator, schema = _operator(node), _schema(node, scope.opsets)
        kernels = KERNELS[self.provider].get(operator, ())
        if schema is None and not kernels:
            return f"unknown to the table of kernels of {self.provider}"
        dtypes = {"T": scope.dtype(node.input[0]) if node.input else None}
        if schema is not None:
            dtypes = {name: scope.dtype(value) for parameter, value in reversed([*_formal(schema, node)]) if value
                      for name in (parameter.type_str, parameter.name)}  # fmt: skip
        known = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
        version = 1 if schema is None else schema.since_version
        reason = misfit(kernels, version, known)
        if reason is None:
            return refusal(operator, known, _attributes(node))
        if schema is not None and misfit(CLAIMED_BY_CPU.get(operator, ()), version, known) is not None:
            body = _definition(schema, node, scope)
            if body is not None:
                inside = [f"{finding.op}: {finding.reason}" for finding in self._call(node, body, scope)]
                return f"{reason}; in its function body {inside[0]}" if inside else None
        return f"{reason} ({self.provider}, ONNX Runtime {RELEASE})"

    def _propagate(self, node: NodeProto, scope: _Scope) -> None:
        """Give outputs of unknown type the dtype that the definition ties them to, or without one the first input's."""
        schema = _schema(node, scope.opsets)
        if schema is None:
            sources = dict(zip(node.output[:1], node.input[:1], strict=False))
        else:
            pairs = [(parameter.type_str, value) for parameter, value in _formal(schema, node)]
            known = {kind: value for kind, value in reversed(pairs) if scope.dtype(value) is not None}
            sources = {value: known.get(kind, "") for kind, value in pairs}
        for value in node.output:
            source = scope.types.get(sources.get(value, ""))
            if value and scope.dtype(value) is None and source is not None:
                scope.types[value] = helper.make_tensor_type_proto(source.tensor_type.elem_type, None)


def _bound(function: FunctionProto, node: NodeProto) -> list[NodeProto]:
    """Return the nodes of a function's body with the attributes of a call, or their defaults, put in."""
    given = {attribute.name: attribute for attribute in (*function.attribute_proto, *node.attribute)}
    nodes = []
    for inner in function.node:
        attributes = []
        for attribute in inner.attribute:
            if not attribute.ref_attr_name:
                attributes.append(attribute)
            elif attribute.ref_attr_name in given:
                bound = AttributeProto()
                bound.CopyFrom(given[attribute.ref_attr_name])
                bound.name = attribute.name
                attributes.append(bound)
        copy = NodeProto()
        copy.CopyFrom(inner)
        del copy.attribute[:]
        copy.attribute.extend(attributes)
        nodes.append(copy)
    return nodes


def _definition(schema: OpSchema, node: NodeProto, scope: _Scope) -> FunctionProto | None:
    """Return the function body in an operator's definition for one node, or None where it has none."""
    opset, definition = scope.opsets["ai.onnx"], cast(Any, schema)  # onnx's stubs lack what is asked for here
    plain = [version for version in definition.function_opset_versions if version <= opset]
    dependent = [version for version in definition.context_dependent_function_opset_versions if version <= opset]
    if plain:
        data = definition.get_function_with_opset_version(max(plain))
    elif dependent and all(value in scope.types for value in node.input if value):
        types = [scope.types.get(value, TypeProto()).SerializeToString() for value in node.input]
        data = definition.get_context_dependent_function_with_opset_version(
            max(dependent), node.SerializeToString(), types
        )
    else:
        return None
    body: FunctionProto = FunctionProto.FromString(data)
    body.attribute_proto.extend(a.default_value for a in schema.attributes.values() if a.default_value.type)
    return body
