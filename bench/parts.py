"""Dividing the time of one call of a compressed denoiser into the parts that it is spent on.

The rewritten graph is run node by node, and each node's time goes to its part; what a plan takes is divided by the time
of each operation inside of it. Inductor fuses across nodes, so the operators and attention are compiled alone as well,
at each shape at which they are called.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bigain_fx import optimize
from bigain_fx.bench import BenchError
from bigain_fx.calls import CallBinder, flat_tensors
from bigain_fx.passes import checks
from bigain_fx.passes.destinations import RULES, rule_of
from bigain_fx.passes.methods import Methods
from bigain_fx.passes.ops import DECIDING, score
from bigain_fx.stopwatch import synchronizer

if TYPE_CHECKING:
    from bigain_fx.models import Workload

aten, bigain = torch.ops.aten, torch.ops.bigain

PARTS = ("score", "match", "select", "merge", "unmerge", "attention", "linear", "convolution", "rest")
PLAN, DECISIONS = "plan", PARTS[:3]
_PART: dict[Any, str] = {
    **dict.fromkeys(DECIDING, PLAN),
    **dict.fromkeys((bigain.merge.default, bigain.group_sizes.default), "merge"),
    **dict.fromkeys((bigain.kv_downsample.default, bigain.kv_downsample.Tensor), "merge"),
    **dict.fromkeys((bigain.unmerge.default, bigain.blend.default), "unmerge"),
    aten.scaled_dot_product_attention.default: "attention",
    **dict.fromkeys((aten.linear.default, aten.addmm.default, aten.mm.default), "linear"),
    aten.conv2d.default: "convolution",
}
ALONE = (PLAN, "merge", "unmerge", "attention")
"""What is compiled alone too."""
_SCORES = frozenset(function.__code__ for function in (score.laplacian_score, score.lowest_scoring))
_SORTS = frozenset({aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable})


class _Timed(Interpreter):
    """Runs a graph; ``seconds`` and ``calls`` by part, and the first arguments of each kind of call worth compiling."""

    def __init__(self, module: GraphModule, wait: Callable[[], None], inside: _Inside | None = None) -> None:
        super().__init__(module)
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.samples: dict[str, tuple[str, Any, Any]] = {}
        self._wait, self._inside = wait, inside

    def run_node(self, n: Node) -> Any:
        part = PLAN if rule_of(n.target) else _PART.get(n.target)
        if part is None:
            return super().run_node(n)
        if part in ALONE:
            arguments = self.fetch_args_kwargs_from_env(n)
            kind = str((n.target, pytree.tree_map(_kind, arguments)))
            self.kinds[kind] += 1
            self.samples.setdefault(kind, (part, n.target, arguments))
        self._wait()
        start = time.perf_counter()
        if part == PLAN and self._inside is not None:
            with self._inside:
                found = super().run_node(n)
        else:
            found = super().run_node(n)
        self._wait()
        self.seconds[part] += time.perf_counter() - start
        self.calls[part] += 1
        return found


class _Inside(TorchDispatchMode):
    """Times what a plan consists of, by what it is for: see :func:`_decision`."""

    def __init__(self, wait: Callable[[], None]) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait = wait

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._wait()
        start = time.perf_counter()
        found = func(*args, **(kwargs or {}))
        self._wait()
        self.seconds[_decision(func, found)] += time.perf_counter() - start
        return found


def _decision(func: Any, found: Any) -> str:
    """Scoring has its functions; matching is what else gives floating point, but for sorts; the rest selects."""
    frame, scores = sys._getframe(2), _SCORES | {rule.positions.__code__ for rule in RULES.values()}
    while frame.f_back is not None:
        if frame.f_code in scores:
            return "score"
        frame = frame.f_back
    floating = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(found))
    return "match" if floating and func not in _SORTS else "select"


def _kind(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def split(workload: Workload, methods: Methods, rounds: int = 5, *, backend: str = "inductor") -> dict[str, Any]:
    """Divide one call of ``workload`` under ``methods``; seconds by part.

    Args:
        workload: a denoiser and its inputs.
        methods: what is applied.
        rounds: runs of the graph, of which the one that takes the median time is divided; and calls of what is
            compiled, of which the median counts.
        backend: what compiles, as for ``torch.compile``; ``"eager"`` compiles nothing.

    Returns:
        ``parts``, of the graph run node by node, which add up to ``total_s``; ``calls``; ``graph_s``, of the graph
        called as it is; and ``compiled``: of each part compiled alone, over all its calls, and of the whole ``call``.

    Raises:
        BenchError: no rounds.
        BigainError: whatever :func:`bigain_fx.optimize` raises.
    """
    checks.integer("rounds", rounds, least=1, most=checks.MANY, error=BenchError)
    wait = synchronizer(next(workload.model.parameters()).device)
    fast = optimize(workload.model, workload.args, workload.kwargs, method=methods, backend="eager")
    graph = fast.prepare(*workload.args, **workload.kwargs).graph
    inputs = flat_tensors(CallBinder(workload.model).bind(workload.args, workload.kwargs)[0])
    runs = []
    with torch.no_grad():
        graph_s = _median(lambda: graph(*inputs), rounds, wait)
        for _ in range(rounds):
            timed = _Timed(graph, wait)
            total = _seconds(lambda timed=timed: timed.run(*inputs), wait)  # type: ignore[misc]
            runs.append((total, timed))
            timed.samples = {} if len(runs) > 1 else timed.samples
        inside = _Inside(wait)
        _Timed(graph, wait, inside).run(*inputs)
        alone = {}
        if backend != "eager":
            alone = _alone(runs[0][1], backend, rounds, wait)
            whole = optimize(workload.model, workload.args, workload.kwargs, method=methods, backend=backend)
            alone["call"] = _median(lambda: whole(*workload.args, **workload.kwargs), rounds, wait)
    total, timed = sorted(runs, key=lambda run: run[0])[(rounds - 1) // 2]
    parts = {part: timed.seconds.get(part, 0.0) for part in PARTS[:-1]}
    deciding, within = timed.seconds.get(PLAN, 0.0), sum(inside.seconds.values())
    parts |= {part: deciding * inside.seconds[part] / within for part in DECISIONS if within}
    return {
        "parts": parts | {"rest": total - sum(parts.values())}, "total_s": total, "graph_s": graph_s,
        "calls": dict(timed.calls), "compiled": alone,
    }  # fmt: skip


def _alone(timed: _Timed, backend: str, rounds: int, wait: Callable[[], None]) -> dict[str, float]:
    """Seconds of all calls of each part, every kind of call compiled as a graph of its own."""
    found: dict[str, float] = defaultdict(float)
    for kind, (part, target, arguments) in timed.samples.items():
        leaves, spec = pytree.tree_flatten(arguments)
        graph = Graph()
        given = [graph.placeholder(f"x{i}") if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
        args, kwargs = pytree.tree_unflatten(given, spec)
        graph.output(graph.call_function(target, args, kwargs))
        run = torch.compile(GraphModule(nn.Module(), graph), fullgraph=True, dynamic=False, backend=backend)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found[part] += timed.kinds[kind] * _median(lambda run=run, tensors=tensors: run(*tensors), rounds, wait)  # type: ignore[misc]
    return dict(found)


def _seconds(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _median(call: Callable[[], Any], rounds: int, wait: Callable[[], None]) -> float:
    """Of ``rounds`` calls after two that are not counted."""
    call(), call()
    return statistics.median(_seconds(call, wait) for _ in range(rounds))
