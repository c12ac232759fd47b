"""Call a compiled graph without Dynamo in between.

Dynamo compares every weight at every call, from Python's dicts up: half a millisecond for SD 2.0, two for SDXL. What it
hands to the backend is our own graph, and nobody else writes into that. So the first call is watched: which tensors the
compiled function takes and gives. Later calls give them to it at once, if the tensors are of the same kinds and torch
is in the same state; any other call goes through Dynamo, which compiles again or raises as always.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bigain_fx.passes.memory import roots, written
from bigain_fx.torch_internals import Kinds

Compiled = Callable[..., Sequence[Any]]
Backend = Callable[[GraphModule, list[Any]], Compiled]
Place = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class _Seen:
    """One call of a compiled function."""

    function: Compiled
    given: tuple[Any, ...]
    results: Sequence[Any]


class _Shortcut:
    """What a compiled function takes and gives, in terms of the inputs and outputs of its graph."""

    def __init__(self, graph: GraphModule, inputs: Sequence[Tensor], outputs: Sequence[Any], seen: _Seen) -> None:
        """Raise ``LookupError`` where a call does not tell: a tensor was given twice, or is of another kind.

        Or where the graph writes into what it is given: Dynamo also guards which of that shares memory.
        """
        if any(root.op != "call_function" for node in graph.graph.nodes for to in written(node) for root in roots(to)):
            raise LookupError
        number = {id(tensor): index for index, tensor in enumerate(inputs)}
        result = {id(tensor): index for index, tensor in enumerate(seen.results)}
        # Buffers may be exchanged for others of their kind: see capture.renew.
        buffers = {id(t): (m._buffers, name) for m in graph.modules() for name, t in m._buffers.items()}
        held = {*buffers, *map(id, graph.parameters()), *map(id, vars(graph).values())}
        apart = len(number) == len(inputs) and len(result) == len(seen.results) and not held & number.keys()
        plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in seen.given)
        if not apart or not plain or not {*map(id, seen.given)} <= held | number.keys():
            raise LookupError
        self.function = seen.function
        self._given: list[Any] = list(seen.given)
        self._inputs = [(at, number[id(t)]) for at, t in enumerate(seen.given) if id(t) in number]
        self._buffers: list[tuple[int, Place]] = [
            (at, buffers[id(t)]) for at, t in enumerate(seen.given) if id(t) in buffers
        ]
        for at, _ in self._inputs:
            self._given[at] = None  # no input outlives its call
        made: Any = graph.graph.output_node().args[0]
        self._constants = tuple(output for output in made if not isinstance(output, Node))
        # Where each output is among results, inputs and constants.
        constants = iter(range(len(result) + len(inputs), len(result) + len(inputs) + len(self._constants)))
        number = {tensor: len(result) + index for tensor, index in number.items()} | result
        self._outputs = [
            number[id(output)] if isinstance(node, Node) else next(constants)
            for node, output in zip(made, outputs, strict=True)
        ]
        self._kinds = Kinds(seen.given)

    def arguments(self, inputs: Sequence[Tensor]) -> list[Any] | None:
        """Return what the function takes for ``inputs``, or None if it was not compiled for these."""
        given = self._given.copy()
        for at, index in self._inputs:
            given[at] = inputs[index]
        for at, (buffers, name) in self._buffers:
            given[at] = buffers[name]
        return given if self._kinds.same(given) else None

    def outputs(self, results: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the outputs of the graph for ``inputs``, of the ``results`` of the function."""
        every = (*results, *inputs, *self._constants)
        return tuple(every[at] for at in self._outputs)


class Direct:
    """``graph``, compiled by ``backend`` through ``torch.compile`` when first called.

    Args:
        graph: takes tensors and returns a tuple; nothing but its buffers is exchanged later.
        backend: as for ``torch.compile``.
    """

    def __init__(self, graph: GraphModule, backend: Backend) -> None:
        self._graph, self._backend = graph, backend
        self._shortcut: _Shortcut | None = None
        self._calls = threading.local()
        self.through_dynamo: Callable[..., Any] = torch.compile(
            graph, fullgraph=True, dynamic=False, backend=self._compile
        )

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """Return what the graph gives for ``inputs``."""
        shortcut = self._shortcut
        if shortcut is not None and (given := shortcut.arguments(inputs)) is not None:
            return shortcut.outputs(shortcut.function(*given), inputs)
        self._calls.seen = None
        self._calls.watched = True
        try:
            outputs: tuple[Any, ...] = self.through_dynamo(*inputs)
            if (seen := self._calls.seen) is not None:
                self._note(inputs, outputs, seen)
        finally:
            self._calls.seen, self._calls.watched = None, False
        return outputs

    def _compile(self, graph: GraphModule, inputs: list[Any]) -> Compiled:
        compiled = self._backend(graph, inputs)

        def watched(*given: Any) -> Sequence[Any]:
            results = compiled(*given)
            if getattr(self._calls, "watched", False):
                self._calls.seen = _Seen(compiled, given, results)
            return results

        return watched

    def _note(self, inputs: Sequence[Tensor], outputs: Sequence[Any], seen: _Seen) -> None:
        """Call the function of ``seen`` from now on, unless that is done."""
        if self._shortcut is None or self._shortcut.function is not seen.function:
            try:
                self._shortcut = _Shortcut(self._graph, inputs, outputs, seen)
            except LookupError:
                self._shortcut = None
