"""How long a fresh process takes to its first step: ``python -m bigain_fx.bench.startup mnist-unet``.

``optimize()`` traces and compiles, with an empty kernel cache or with one that an earlier process filled; a package of
``export_package`` and a graph of ``export_onnx`` are only loaded. Every run is a process of its own; their outputs are
compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bigain_fx import command_line
from bigain_fx.bench import BenchError, result, timing
from bigain_fx.passes import checks
from bigain_fx.passes.grammar import parse

ROWS = {
    "optimize, empty cache": "optimize", "optimize, filled cache": "optimize", "export_package": "package",
    "export_onnx": "onnx",
}  # fmt: skip
SECONDS = ("import_s", "ready_s", "first_call_s")


@dataclass(frozen=True)
class Startup:
    """One way to the first step; seconds are medians over fresh processes.

    Attributes:
        name: a key of :data:`ROWS`.
        import_s: the packages that it needs.
        ready_s: the model or the file, up to the first call; for ``optimize`` the weights, capture and rewrite.
        first_call_s: what is compiled then included.
        total_s: all three.
        relative_l2: of the output, against that of ``optimize`` with an empty cache; 0 is identical.
        runs: every run's three times.
    """

    name: str
    import_s: float
    ready_s: float
    first_call_s: float
    total_s: float
    relative_l2: float
    runs: list[list[float]]


def run(model: str, method: str, size: int | None, batch: int, rounds: int, folder: Path) -> list[Startup]:
    """Export ``model`` once, then time ``rounds`` processes of each row, taking turns.

    Raises:
        BenchError: a process fails.
    """
    import bigain_fx as bgx
    from bigain_fx.models import load
    from bigain_fx.passes.grammar import parse

    workload = load(model, size=size, batch=batch)
    for name, export in (("denoiser.pt2", bgx.export_package), ("denoiser.onnx", bgx.export_onnx)):
        export(workload.model, workload.args, folder / name, kwargs=workload.kwargs, method=parse(method))
    torch.save((workload.args, workload.kwargs), folder / "inputs.pt")
    runs: dict[str, list[list[float]]] = {name: [] for name in ROWS}
    outputs: dict[str, torch.Tensor] = {}
    for index in range(rounds):
        for name, kind in ROWS.items():
            cache = folder / ("filled" if name.endswith("filled cache") else f"empty-{index}")
            if index == 0 and name.endswith("filled cache"):
                _process(kind, model, method, size, batch, folder, cache)
            seconds, outputs[name] = _process(kind, model, method, size, batch, folder, cache)
            runs[name].append(seconds)
    reference = outputs["optimize, empty cache"]
    rows = []
    for name, found in runs.items():
        imported, ready, called = (statistics.median(column) for column in zip(*found, strict=True))
        error = timing.relative_error([reference], [outputs[name]]) or 0.0
        rows.append(Startup(name, imported, ready, called, statistics.median(map(sum, found)), error, found))
    return rows


def _process(
    kind: str, model: str, method: str, size: int | None, batch: int, folder: Path, cache: Path
) -> tuple[list[float], torch.Tensor]:
    options = json.dumps([kind, model, method, size, batch, os.fspath(folder)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from bigain_fx.bench import startup; startup.first_step({options!r})"],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": os.fspath(cache)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise BenchError(f"a process for {kind} fails: {(done.stderr.strip().splitlines() or ['no word'])[-1][:300]}")
    output = torch.load(folder / "output.pt")
    assert isinstance(output, torch.Tensor)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds, output


def first_step(options: str) -> None:
    """What each process does; prints seconds to import, to be ready and for the first call."""
    kind, model, method, size, batch, place = json.loads(options)
    folder = Path(place)
    args, kwargs = torch.load(folder / "inputs.pt")
    started = time.perf_counter()
    import bigain_fx as bgx

    denoiser: Any
    if kind == "optimize":
        _ = bgx.optimize
        import diffusers.models  # noqa: F401

        from bigain_fx.models import load
        from bigain_fx.passes.grammar import parse

        imported = time.perf_counter()
        workload = load(model, size=size, batch=batch)
        denoiser = bgx.optimize(workload.model, args, kwargs, method=parse(method))
    elif kind == "package":
        _ = bgx.load_package
        imported = time.perf_counter()
        denoiser = bgx.load_package(folder / "denoiser.pt2")
    else:
        _ = bgx.OrtDenoiser
        import onnxruntime  # noqa: F401

        imported = time.perf_counter()
        denoiser = bgx.OrtDenoiser(folder / "denoiser.onnx")
    ready = time.perf_counter()
    with torch.no_grad():
        output = denoiser(*args, **kwargs, return_dict=False)[0]
    called = time.perf_counter()
    torch.save(output, folder / "output.pt")
    print(json.dumps([imported - started, ready - imported, called - ready]))


def to_markdown(found: dict[str, Any]) -> str:
    """Where and how it was measured, and a table."""
    lines = [
        f"# {found['workload']}: time to the first step, {found['method']}", "",
        f"- {result.place(found)}",
        f"- median of {found['rounds']} fresh processes each, in turns, without importing torch; {found['date']}",
        f"- `{found['command']}`", "",
        "| way | import (s) | ready (s) | first call (s) | in all (s) | relative L2 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in found["rows"]:
        cells = [f"{row[key]:.2f}" for key in (*SECONDS, "total_s")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['relative_l2']:.1e} |")
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[str, typer.Argument(help="as for bigain-fx bench")] = "mnist-unet",
    methods: Annotated[str, typer.Option(help="one entry, as for bigain-fx bench")] = "bigain-tm:0.7:window=16",
    size: Annotated[int | None, typer.Option(help="side of the latent, in pixels")] = None,
    batch: Annotated[int, typer.Option(help="samples a call")] = 2,
    rounds: Annotated[int, typer.Option(help="processes of each row")] = 3,
    out: Annotated[Path, typer.Option(help="folder for the JSON and the Markdown")] = Path("bigain-bench"),
) -> None:
    """Time MODEL to its first step in fresh processes: optimized, as a package, as ONNX."""
    checks.integer("rounds", rounds, least=1, most=checks.MANY)
    parse(methods)
    result.prepare(out)
    about = result.about(torch.device("cpu"), "startup")
    with tempfile.TemporaryDirectory() as folder:
        rows = run(model, methods, size, batch, rounds, Path(folder))
    found = {
        "workload": Path(model).name, "method": methods, "size": size, "batch": batch, "rounds": rounds, **about,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    stem = f"startup-{Path(model).name}"
    result.write(out / f"{stem}.json", json.dumps(found, indent=1) + "\n")
    result.write(out / f"{stem}.md", to_markdown(found))
    Console().print(to_markdown(found), markup=False)


if __name__ == "__main__":
    command_line.run(main)
