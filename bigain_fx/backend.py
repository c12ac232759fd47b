"""``torch.compile(model, backend="bigain", options={"method": ...})``: the same passes, on a graph from Dynamo.

Dynamo's torch-level graph is lowered to pre-dispatch ATen, brought to the form in which ``optimize`` captures a model
(inputs named as the arguments of ``forward``, weights as attributes), rewritten, and given its weights back as inputs:
whatever Dynamo guards and swaps behind them stays true.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._inductor import list_mode_options
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from bigain_fx.compilers import check_compiler
from bigain_fx.families import GridReader, grid_for, resolve
from bigain_fx.passes import checks
from bigain_fx.passes.alpha import LinearAlpha
from bigain_fx.passes.errors import CaptureError, InputError, MethodError, RewriteError, first_line
from bigain_fx.passes.images import Hint, as_grids
from bigain_fx.passes.methods import Methods, normalize
from bigain_fx.passes.pipeline import rewrite
from bigain_fx.regions import own_cache
from bigain_fx.report import Report, announce
from bigain_fx.static import statically

log = logging.getLogger("bigain_fx")

OPTIONS = ("method", "grid", "backend", "mode")
_HOLDERS = frozenset({"__dict__", "_modules", "_parameters", "_buffers"})


@dataclass(frozen=True)
class Options:
    """What is asked of the backend.

    Attributes:
        methods: what to apply; empty for the dense graph.
        grid: as for :func:`bigain_fx.optimize`; no function, for Dynamo compiles without values.
        backend: what compiles the rewritten graph: a name that Dynamo knows, or a Dynamo backend.
        mode: of inductor, such as ``"max-autotune"``; None is its default.
    """

    methods: Methods
    grid: Hint | None = None
    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> Options:
        """Read the ``options`` of ``torch.compile``.

        Raises:
            MethodError: no method, or one that is none.
            GridError: ``grid`` is no pair of integers.
            InputError: an option that there is not, a backend that torch does not know, or a mode that it has not.
        """
        given = dict(checks.keywords("options", {} if options is None else options))
        if unknown := [key for key in given if key not in OPTIONS]:
            raise InputError(f"options has {unknown[0]!r}; the backend 'bigain' takes {', '.join(OPTIONS)}")
        if "method" not in given:
            raise MethodError(
                "options has no method; write torch.compile(model, backend='bigain', dynamic=False, "
                "options={'method': bigain_fx.LaplacianMerge(0.7)})"
            )
        if isinstance(given["method"], Iterator):
            raise MethodError(
                f"method={given['method']!r} can be read only once, and Dynamo may ask again; give a list"
            )
        read = cls(normalize(given.pop("method")), **given)
        check_compiler(read.backend, read.mode)
        if callable(read.grid):
            raise InputError(
                f"grid={read.grid!r} is a function of the inputs, whose values Dynamo does not have when it compiles; "
                "give (rows, columns), or a list of these, or use bigain_fx.optimize"
            )
        if read.grid is not None:
            as_grids(read.grid)
        return read

    def compile(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Hand ``module`` to the inner backend."""
        inner: Callable[..., Any] = lookup_backend(self.backend)
        extra: dict[str, Any] = {}
        if self.mode is not None:  # inductor takes its options, any other backend the name
            is_name = self.backend != "inductor"
            extra = {"mode": self.mode} if is_name else {"config_patches": list_mode_options(self.mode)}
        with own_cache():
            compiled: Callable[..., Any] = inner(module, list(example_inputs), **extra)
        return compiled


@dataclass(frozen=True)
class Frame:
    """The Python frame that Dynamo compiles.

    Attributes:
        model: its ``self``, where that is a module.
        code: the code that runs in it: ``forward``, a wrapper around it, or any function.
        img_shapes: its argument of that name, of which Dynamo makes constants.
    """

    model: nn.Module | None
    code: CodeType
    img_shapes: Any = None

    @classmethod
    def current(cls) -> Frame:
        """The frame that is being compiled now."""
        translator = InstructionTranslator.current_tx()
        local, code = translator.f_locals, translator.f_code
        model, named = local.get("self"), local.get(inspect.getargs(code).varkw or "") or {}
        return cls(model if isinstance(model, nn.Module) else None, code, (named | local).get("img_shapes"))

    @property
    def name(self) -> str:
        """Class of the model, or name of the function."""
        return type(self.model).__name__ if self.model is not None else self.code.co_name

    def argument(self, source: str) -> str:
        """Name of the input that Dynamo calls ``source``, ``"timestep"`` of ``"L['kwargs']['timestep']"``.

        A wrapper takes ``*args``: their names are then those of the ``forward`` that it wraps.
        """
        path, declared = _path(source), inspect.getargs(self.code)
        if path[:1] == [declared.varkw]:
            path = path[1:]
        elif path[:1] == [declared.varargs]:
            index, names = int(path[1]), self._parameters()
            path = [names[index], *path[2:]] if index < len(names) else path
        return "_".join(path)

    def _parameters(self) -> list[str]:
        if self.model is None:
            return []
        wrapper: Any = inspect.unwrap(self.model.forward, stop=self._runs)
        return list(inspect.signature(self.model.forward).parameters) if self._runs(wrapper) else []

    def _runs(self, function: Any) -> bool:
        return getattr(function, "__code__", None) is self.code


def bigain(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Rewrite one Dynamo graph and compile it with the inner backend; what was done is logged on ``bigain_fx``.

    Args:
        gm: a torch-level graph from Dynamo; of symbolic shapes it is compiled for those of this call.
        example_inputs: its inputs.
        options: ``{"method": ..., "grid": None, "backend": "inductor", "mode": None}``; ``method`` must be there.
        mode: as in ``options``, which is where it belongs: ``torch.compile`` takes one or the other.

    Returns:
        What the inner backend returns: takes the graph's flat inputs, gives its flat outputs.

    Raises:
        MethodError: no method, or one that is none, or a schedule without timestep units for an unknown family.
        InputError: a wrong option, sizes that hang on values, train mode, or gradients asked for.
        CaptureError: the graph cannot be lowered to ATen; the cause is chained.
        GridError: ``grid`` does not fit.
        RewriteError: an alpha schedule, and no timestep among the inputs.
    """
    chosen = Options.read(options if mode is None else {"mode": mode, **(options or {})})
    frame = Frame.current()
    return statically(gm, example_inputs, partial(_compile, chosen, frame), frame.argument)


def _compile(chosen: Options, frame: Frame, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    if not inputs:  # a fragment between two graph breaks
        return chosen.compile(gm, example_inputs)
    names = _names(gm, inputs, frame)
    _check(frame, dict(zip(names, inputs, strict=True)))
    if chosen.grid is not None and "img_ids" in names:
        raise InputError(
            f"grid={chosen.grid!r}: img_ids tells the grid, and Dynamo does not look at its values: another size of as "
            "many tokens would get this graph; use bigain_fx.optimize"
        )
    grid_for(chosen.grid, {}, GridReader()({"img_shapes": frame.img_shapes}))
    methods = resolve(chosen.methods, frame.model)
    captured = _lower(gm, inputs, names)
    try:
        rewritten = rewrite(captured, methods, chosen.grid, fragment=True)
    except RewriteError as error:
        scheduled = any(isinstance(getattr(method, "alpha", None), LinearAlpha) for method in methods)
        hint = " (a number is no input of a compiled graph: pass it as a tensor)" if scheduled else ""
        raise RewriteError(f"{error}{hint}") from None
    report = Report.of(frame.name, methods, rewritten)
    announce(report)
    log.debug("%s", report)
    return chosen.compile(_with_weights_as_inputs(rewritten.module, gm, inputs, names), example_inputs)


def _names(gm: GraphModule, inputs: Sequence[Node], frame: Frame) -> list[str]:
    """One identifier for every input of the graph: the argument's, or the path of the weight."""
    names: list[str] = []
    for node in inputs:
        source = node.meta["grapharg"].source.name
        name = "_".join(_path(source)) if _is_weight(node) else frame.argument(source)
        free = name.isidentifier() and name not in names and not hasattr(gm, name)
        names.append(name if free else node.name)
    return names


def _path(source: str) -> list[str]:
    """The parts of a source, ``self`` left out: ``L['self']._modules['net'].0`` is ``["net", "0"]``."""
    parts = [part for part in re.findall(r"\w+", source) if part not in _HOLDERS]
    return parts[2:] if parts[:2] == ["L", "self"] else parts[1:]


def _is_weight(node: Node) -> bool:
    kind = node.meta["grapharg"].source.guard_source
    return isinstance(node.meta["example_value"], nn.Parameter) or bool(
        kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module()
    )


def _check(frame: Frame, inputs: Mapping[str, Node]) -> None:
    """Refuse what would give a wrong answer, or a traceback from inside the passes."""
    if frame.model is not None and frame.model.training:
        raise InputError(f"{frame.name} is in train mode; call model.eval() first")
    values = {name: node.meta["example_value"] for name, node in inputs.items()}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not all(isinstance(size, int) for size in tensor.shape):
            shape = f"({', '.join(map(str, tensor.shape))})"
            raise InputError(f"{name} has the symbolic shape {shape}; call torch.compile with dynamic=False")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise InputError(f"{name} requires gradients, which 'bigain' does not give; call it under torch.no_grad()")
    if scalars := [name for name in values if name not in tensors]:
        raise InputError(
            f"{scalars[0]} is a symbolic {type(values[scalars[0]]).__name__}; call torch.compile with dynamic=False, "
            "and pass as a tensor what changes from call to call"
        )


def _lower(gm: GraphModule, inputs: Sequence[Node], names: Sequence[str]) -> GraphModule:
    """The graph as ``bigain_fx.capture`` would give it: pre-dispatch ATen, weights (fake ones) as attributes."""
    values = [node.meta["example_value"] for node in inputs]
    try:
        # Dynamo's own fake mode: the one that it has ready for the inner backend stays unused.
        mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        with preserve_node_meta(), mode:
            lowered = make_fx(Interpreter(gm).run, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    except Exception as error:
        raise CaptureError(f"Dynamo's graph cannot be lowered to ATen: {first_line(error)}") from error
    graph = lowered.graph
    traced = list(graph.find_nodes(op="placeholder"))
    body = traced[-1].next
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {key: (".".join(_path(path)), kind) for key, (path, kind) in stack.items()}
    for node, origin, name in zip(traced, inputs, names, strict=True):
        weight = _is_weight(origin)
        if weight:
            _hold(lowered, name, origin.meta["example_value"])
        with graph.inserting_before(body if weight else node):
            new = graph.get_attr(name) if weight else graph.placeholder(name)
        _replace(node, new)
    return GraphModule(lowered, graph)


def _hold(module: nn.Module, name: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def _with_weights_as_inputs(
    rewritten: GraphModule, gm: GraphModule, inputs: Sequence[Node], names: Sequence[str]
) -> GraphModule:
    """A graph with exactly the inputs of ``gm``, and what Dynamo told the compiler of them."""
    graph = rewritten.graph
    known = {node.target: node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    with graph.inserting_before(next(iter(graph.nodes))):
        new = [graph.placeholder(name) for name in names]
    for node, origin, name in zip(new, inputs, names, strict=True):
        if name in known:
            _replace(known[name], node)
        node.meta |= {"val": origin.meta["example_value"], "tensor_dict": origin.meta.get("tensor_dict", {})}
        node._dynamo_source = origin._dynamo_source  # type: ignore[attr-defined]
    result = GraphModule(rewritten, graph)
    result.meta.update(gm.meta)
    # AOTAutograd wants to know where each tensor comes from: the constants of the rewrite come from here.
    result._param_name_to_source = {name: ConstantSource(name) for name, _ in result.named_buffers()}  # type: ignore[assignment]
    return result


def _replace(old: Node, new: Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
