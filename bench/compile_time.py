"""What rewriting costs at compile time: ``python -m bigain_fx.bench.compile_time sdxl flux``.

Every block of the model is there, but narrow, and with few tokens, so that it fits into memory and runs in no time:
compiling takes its time by nodes and kernels, and those are the full model's. Every run is a process of its own with
an empty kernel cache. Each round calls from another depth of the stack: at some depths Python 3.11 maps and unmaps
memory at every call of a function (seconds, for dense and rewritten graphs alike, as their sizes happen to fall).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bigain_fx import command_line
from bigain_fx.bench import BenchError, result
from bigain_fx.calls import CallBinder, flat_tensors
from bigain_fx.capture import capture
from bigain_fx.models import KNOWN, Workload, example_inputs, load
from bigain_fx.passes import checks
from bigain_fx.passes.grammar import parse
from bigain_fx.passes.methods import Methods
from bigain_fx.settings import Settings

DENSE = "dense"
METHODS = (DENSE, *(f"bigain-tm:0.7:{rest}" for rest in ("window=16", "block:window=16", "window=16+bigain-td:2")))
LATENT = 32
NARROW: dict[str, dict[str, Any]] = {
    "sd2": {
        "sample_size": LATENT, "block_out_channels": (64, 128, 256, 256), "attention_head_dim": (1, 2, 4, 4),
        "cross_attention_dim": 256,
    },
    "sdxl": {
        "sample_size": LATENT, "block_out_channels": (64, 128, 256), "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 256,
    },
    "flux": {"num_attention_heads": 2, "joint_attention_dim": 256, "pooled_projection_dim": 64},
}  # fmt: skip
"""What is smaller than in the known configurations: heads are as wide as they were, there are fewer of them."""
NARROWED = f": every block of the full model, but narrow, and a latent of {LATENT} x {LATENT}"


@dataclass(frozen=True)
class Compiled:
    """One method on one layout; seconds are medians over fresh processes.

    Attributes:
        method: in the text grammar; all of them with ``levels=None``, which rewrites most.
        rewritten: attentions that were changed.
        nodes: of the graph that is compiled.
        capture_s: to capture the graph.
        passes_s: to match and rewrite it; for dense, to match.
        first_call_s: to compile it, one run included.
        ratio: passes and first call over the first call of dense, pair by pair within a round; None for dense.
        runs: the three times of every process.
    """

    method: str
    rewritten: int
    nodes: int
    capture_s: float
    passes_s: float
    first_call_s: float
    ratio: float | None
    runs: list[list[float]]


def narrow(name: str) -> Workload:
    """The layout ``name`` of :data:`NARROW`, or what :func:`bigain_fx.models.load` has under that name, as it is.

    Raises:
        InputError: there is nothing of that name.
    """
    if name not in NARROW:
        return load(name, batch=1)
    kind, config = KNOWN[name]
    import diffusers

    model = getattr(diffusers, kind)(**config | NARROW[name]).eval().requires_grad_(False)
    return Workload(name, model, (), example_inputs(model, LATENT, 1), (LATENT // 2, LATENT // 2))


def everywhere(text: str) -> Methods:
    """The methods of ``text`` with ``levels=None``."""
    return tuple(replace(method, levels=None) for method in parse(text))


def run(name: str, rounds: int, tell: Callable[[str], None]) -> list[Compiled]:
    """Compile the layout ``name`` in ``rounds`` processes for each method, taking turns; ``tell`` hears of each.

    Raises:
        BenchError: a process fails.
    """
    runs: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    counts: dict[str, tuple[int, int]] = {}
    for index in range(rounds):
        for method in METHODS:
            rewritten, nodes, *seconds = _process(name, method, depth=50 * index)
            runs[method].append(seconds)
            counts[method] = int(rewritten), int(nodes)
            times = "capture {:.1f} s, passes {:.2f} s, first call {:.1f} s".format(*seconds)
            tell(f"{name}, round {index + 1} of {rounds}, {method}: {times}")
    rows = []
    for method, found in runs.items():
        captured, passed, called = (statistics.median(column) for column in zip(*found, strict=True))
        pairs = zip(found, runs[DENSE], strict=True)
        ratio = statistics.median((passes + first) / dense for (_, passes, first), (*_, dense) in pairs)
        over = None if method == DENSE else ratio
        rows.append(Compiled(method, *counts[method], captured, passed, called, over, found))
    return rows


def _process(name: str, method: str, depth: int = 0) -> list[float]:
    """What :func:`first_call` prints in a process of its own, called through ``depth`` others."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [
                sys.executable, "-W", "ignore", "-c",
                f"from bigain_fx.bench import compile_time; compile_time.first_call({name!r}, {method!r}, {depth})",
            ],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise BenchError(f"a process for {method} of {name} fails: {last[:300]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_call(name: str, method: str, depth: int = 0) -> None:
    """What each process does; prints attentions rewritten, nodes, and seconds of capture, passes and first call."""
    if depth:
        first_call(name, method, depth - 1)
        return
    workload = narrow(name)
    arguments, _ = CallBinder(workload.model).bind(workload.args, workload.kwargs)
    started = time.perf_counter()
    captured = capture(workload.model, arguments)
    at_capture = time.perf_counter()
    settings = Settings()
    rewritten = settings.rewrite(captured.module, everywhere(method), workload.grid)
    compiled = settings.compile(rewritten.module)
    at_rewrite = time.perf_counter()
    with torch.no_grad():
        outputs = compiled(*flat_tensors(arguments))
    called = time.perf_counter()
    if not all(output.isfinite().all() for output in outputs):
        raise BenchError(f"{method} of {name} returns numbers that are not finite")
    changed = sum(record.action != "kept" for record in rewritten.records)
    seconds = [at_capture - started, at_rewrite - at_capture, called - at_rewrite]
    print(json.dumps([changed, len(rewritten.module.graph.nodes), *seconds]))


def to_markdown(found: dict[str, Any]) -> str:
    """Where and how it was measured, and a table."""
    lines = [
        f"# {found['layout']}: time to compile", "",
        f"- {result.place(found)}",
        f"- {found['parameters'] / 1e6:.1f} M parameters" + NARROWED * (found["layout"] in NARROW),
        f"- median of {found['rounds']} fresh processes each, in turns, with empty kernel caches; {found['date']}",
        f"- `{found['command']}`", "",
        "| method, `levels=None` | rewritten | nodes | capture (s) | passes (s) | first call (s) | over dense |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in found["rows"]:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        seconds = f"{row['capture_s']:.1f} | {row['passes_s']:.2f} | {row['first_call_s']:.1f}"
        lines.append(f"| {row['method']} | {row['rewritten']} | {row['nodes']} | {seconds} | {ratio} |")
    lines += ["", "*Over dense*: passes and first call, over the first call of dense, within a round."]
    return "\n".join(lines) + "\n"


def main(
    layouts: Annotated[list[str], typer.Argument(help=f"{', '.join(NARROW)}; others as for bigain-fx bench, whole")],
    rounds: Annotated[int, typer.Option(help="processes of each method")] = 1,
    out: Annotated[Path, typer.Option(help="folder for the JSON and the Markdown")] = Path("bigain-bench"),
) -> None:
    """Time how long LAYOUTS take to compile in fresh processes, dense and rewritten."""
    checks.integer("rounds", rounds, least=1, most=checks.MANY)
    result.prepare(out)
    console = Console()
    for name in layouts:
        parameters = sum(parameter.numel() for parameter in narrow(name).model.parameters())
        about = result.about(torch.device("cpu"), "compile_time")
        rows = run(name, rounds, lambda text: console.print(text, markup=False, highlight=False))
        found = {
            "layout": name, "parameters": parameters, "rounds": rounds, **about, "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        result.write(out / f"compile-{name}.json", json.dumps(found, indent=1) + "\n")
        result.write(out / f"compile-{name}.md", to_markdown(found))
        console.print(to_markdown(found), markup=False)


if __name__ == "__main__":
    command_line.run(main)
