"""What our wrapper costs a call: ``python -m bigain_fx.bench.overhead sd2 sdxl flux --out bench/results``.

Every block of the model is there, but narrow, and what is compiled computes nothing: what is left of a call is the time
of the host. Three calls are timed in turns: of the rewritten graph, as ``torch.compile`` gives it (its guards compare
every weight); of the optimized denoiser, which binds the arguments, looks for changes of the model, finds the graph,
calls what was compiled without these guards, and makes the output class; and of a plain ``torch.compile`` of the model.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from bigain_fx.bench import result
from bigain_fx.bench.compile_time import NARROWED, narrow
from bigain_fx.calls import CallBinder, flat_tensors
from bigain_fx.denoiser import optimize
from bigain_fx.passes.grammar import parse
from bigain_fx.stopwatch import interleaved

LAYOUTS = ("sd2", "sdxl", "flux")
METHOD = "bigain-tm:0.7:window=16"
CALLS = ("the compiled graph", "optimized", "plain torch.compile")


def nothing(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile ``graph`` to a function that gives the same empty outputs at every call."""

    def empty(node: Any) -> Any:
        value = node.meta["example_value"]
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    outputs = pytree.tree_map_only(torch.fx.Node, empty, graph.graph.output_node().args[0])
    return lambda *inputs: outputs


def measure(layout: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each of :data:`CALLS`: medians of ``rounds`` in turns, and of the differences within them."""
    workload = narrow(layout)
    model, kwargs = workload.model, workload.kwargs
    fast = optimize(model, method=parse(METHOD), backend=nothing, grid=workload.grid)
    plain = torch.compile(model, backend=nothing, dynamic=False)
    inputs = flat_tensors(CallBinder(model).bind((), kwargs)[0])
    with torch.no_grad():
        graph = torch.compile(fast.prepare(**kwargs).graph, fullgraph=True, dynamic=False, backend=nothing)
        calls = [partial(graph, *inputs), partial(fast, **kwargs), partial(plain, **kwargs)]
        for call in calls:
            call()
        bare, ours, theirs = interleaved(calls, rounds, lambda: None)
    return {
        "layout": layout, "modules": len(list(model.modules())), "weights": len(list(model.parameters())),
        "rounds": rounds,
        "ms": {name: 1e3 * statistics.median(row) for name, row in zip(CALLS, (bare, ours, theirs), strict=True)},
        "wrapper_ms": 1e3 * statistics.median(mine - other for mine, other in zip(ours, bare, strict=True)),
        "over_plain_ms": 1e3 * statistics.median(mine - other for mine, other in zip(ours, theirs, strict=True)),
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """Where and how it was measured, and a table."""
    lines = [
        f"# {found['layout']}: what the wrapper costs a call", "",
        f"- {result.place(found)}",
        f"- {found['modules']} modules, {found['weights']} weights{NARROWED}; the compiled graph computes nothing",
        f"- medians of {found['rounds']} calls in turns; {found['date']}",
        f"- `{found['command']}`", "",
        "| call | ms |", "| --- | ---: |",
        *(f"| {name} | {ms:.3f} |" for name, ms in found["ms"].items()),
        f"| *optimized* less *the compiled graph*, within a round | {found['wrapper_ms']:.3f} |",
        f"| *optimized* less *plain torch.compile*, within a round | {found['over_plain_ms']:.3f} |",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(
    layouts: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(LAYOUTS)}; all by default")] = None,
    rounds: Annotated[int, typer.Option(help="calls of each kind")] = 400,
    out: Annotated[Path, typer.Option(help="folder for the JSON and the Markdown")] = Path("bigain-bench"),
) -> None:
    """Time what a call of LAYOUTS costs the host."""
    result.prepare(out)
    for layout in layouts or LAYOUTS:
        found = measure(layout, rounds) | result.about(torch.device("cpu"), "overhead")
        result.write(out / f"overhead-{layout}.json", json.dumps(found, indent=1) + "\n")
        result.write(out / f"overhead-{layout}.md", markdown(found))
        Console().print(markdown(found), markup=False)


if __name__ == "__main__":
    typer.run(main)
