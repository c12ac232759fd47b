"""Run a benchmark: build and compile every row, then time all of them interleaved."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils import _pytree as pytree

from bigain_fx.bench import BenchError, result, rows, timing
from bigain_fx.bench.result import BenchResult, Row
from bigain_fx.bench.rows import AS_EAGER, DENSE, EAGER, ONNX, PLAIN, TOMESD, Asked, Built, Ready
from bigain_fx.calls import CallBinder
from bigain_fx.passes import checks
from bigain_fx.passes.methods import Methods
from bigain_fx.stopwatch import synchronizer

if TYPE_CHECKING:
    from bigain_fx.models import Workload


def run(
    workload: Workload,
    methods: Mapping[str, Methods],
    *,
    eager: Mapping[str, Methods] | None = None,
    tomesd: Sequence[float] = (),
    onnx: Mapping[str, Methods] | None = None,
    rounds: int = 7,
    warmup: int = 1,
    backend: str = "inductor",
    mode: str | None = None,
    out: Path | None = None,
    name: str | None = None,
    turn: Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> BenchResult:
    """Time ``workload`` dense eager, by plain ``torch.compile``, dense as we compile it, with each method and its free
    bound, and its peers.

    Args:
        workload: a denoiser in eval mode, and the inputs to call it with.
        methods: as :func:`bigain_fx.passes.methods.parse_list` returns them; entries that are dense add nothing, since
            both dense rows are always there.
        eager: what to time without compiling as well, likewise.
        tomesd: ratios at which to time the package tomesd as well, eager and compiled.
        onnx: what to time through ONNX Runtime as well, likewise. Each holds its own copy of the weights. Where ONNX
            Runtime or tomesd is not to be had, a line says so.
        rounds: timed calls of each row.
        warmup: rounds before those, after the first call of each row.
        backend, mode: as for ``torch.compile``; ``"eager"`` runs the graphs as they are.
        out: folder for ``<name>.json`` and ``<name>.md``, made if need be; older ones of that name are replaced.
        name: of these files; by default ``stem`` of the result.
        turn: a file to make once every row is built; timing starts when somebody deletes it.
        seed: of the bootstrap.
        progress: show a bar on standard error.

    Raises:
        BenchError: an argument that cannot be, ``out`` that cannot be written, a graph that does not compile, or an
            output that is not finite.
        BigainError: whatever :func:`bigain_fx.optimize` raises.
    """
    asked = Asked(methods, eager or {}, onnx or {}, tomesd, backend, mode)
    _check_arguments(workload, asked, rounds, warmup)
    asked, notes = rows.possible(workload, asked)
    console = Console(stderr=True)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)
    if out is not None:
        result.prepare(out)
    date = result.now()
    device = next(workload.model.parameters()).device
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not progress,
    )  # fmt: skip
    with bar, torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        ready = _prepare_all(workload, asked, notes, device, bar, Path(folder))
        if turn is not None:
            notes.append("built beside other runs, timed alone: compile times are longer than alone")
            _await(turn)
        task = bar.add_task("time", total=(warmup + rounds) * len(ready))
        seconds = timing.interleave(
            {name: row.built.call for name, row in ready.items()}, rounds, warmup, check=timing.check_finite,
            synchronize=synchronizer(device), tick=lambda: bar.advance(task),
        )  # fmt: skip
    weights = list(workload.model.parameters())
    arguments, _ = CallBinder(workload.model).bind(workload.args, workload.kwargs)
    found = BenchResult(
        workload=Path(workload.name).name,
        model=type(workload.model).__name__,
        parameters=sum(weight.numel() for weight in weights),
        weight_bytes=sum(weight.nbytes for weight in weights),
        device=device.type,
        dtype=str(weights[0].dtype).removeprefix("torch."),
        inputs=_shapes(arguments),
        backend=backend,
        mode=mode,
        rounds=rounds,
        warmup=warmup,
        seed=seed,
        date=date,
        command=result.command(),
        machine=result.machine(device),
        versions=result.versions(),
        tokens=max(row.built.tokens for row in ready.values()) or None,
        notes=tuple(notes),
        rows=_rows(ready, seconds, asked.bounds(), seed),
    )
    if out is not None:
        name = name or found.stem
        result.write(out / f"{name}.md", found.to_markdown())
        result.write(out / f"{name}.json", json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
    return found


def _check_arguments(workload: Workload, asked: Asked, rounds: int, warmup: int) -> None:
    checks.integer("rounds", rounds, least=1, most=checks.MANY, error=BenchError)
    checks.integer("warmup", warmup, least=0, most=checks.MANY, error=BenchError)
    for name, given in asked.methods.items():
        taken = name in (DENSE, PLAIN) or name.startswith(("bound:", ONNX, TOMESD)) or name.endswith(AS_EAGER)
        if given and taken:
            raise BenchError(f"methods has {name!r}, the name of a row that is not a method; call it something else")
    weight = next(workload.model.parameters(), None)
    if weight is None or weight.is_meta:
        raise BenchError(f"model {workload.name!r} has no weights in memory; load it on cpu or cuda")


def _prepare_all(
    workload: Workload, asked: Asked, notes: list[str], device: torch.device, bar: Progress, folder: Path
) -> dict[str, Ready]:
    """Build, compile and check every row, one after another.

    A row of tomesd that fails is left out, and ``notes`` says why: that is a finding, and no fault of ours.
    """
    ready: dict[str, Ready] = {}
    reference = timing.tensors_of(workload.model(*workload.args, **workload.kwargs))

    def prepare(name: str, make: Callable[[], Built]) -> None:
        bar.update(task, description=f"build {name}")
        try:
            ready[name] = rows.prepare(name, make, reference, device, asked.backend)
        except BenchError as error:
            if not name.startswith(TOMESD):
                raise
            notes.append(str(error))
            bar.console.print(notes[-1], soft_wrap=True, markup=False)
        bar.advance(task)

    builders = list(rows.builders(workload, asked, folder))
    task = bar.add_task("build", total=len(builders))
    for name, make in builders:
        prepare(name, make)
    bounds = list(rows.bound_builders(workload, asked, ready))
    bar.update(task, total=len(builders) + len(bounds))
    for name, make in bounds:
        prepare(name, make)
    bar.update(task, description="built")
    return ready


def _await(turn: Path) -> None:
    turn.touch()
    while turn.exists():
        time.sleep(0.1)


def _rows(
    ready: Mapping[str, Ready], seconds: Mapping[str, Sequence[float]], bounds: Mapping[str, str | None], seed: int
) -> tuple[Row, ...]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    onnx_base = ONNX + DENSE if ONNX + DENSE in ready else DENSE
    bases = {name: onnx_base if name.startswith(ONNX) and name != onnx_base else DENSE for name in ready}
    speedups = {name: timing.speedup(seconds[bases[name]], values, seed) for name, values in seconds.items()}
    table = []
    for name, row in ready.items():
        limit = bounds.get(name) if row.built.sites else None
        limit = limit if limit in ready else None
        efficiency = None
        if limit is not None and speedups[limit].low > 1:
            efficiency = timing.efficiency(seconds[DENSE], seconds[name], seconds[limit], seed)
        compiled = row.built.kind == "compiled"
        table.append(
            Row(
                name=name,
                seconds=tuple(seconds[name]),
                median_s=medians[name],
                speedup=speedups[name],
                base=bases[name],
                bound=limit,
                efficiency=efficiency,
                relative_l2=row.relative_l2,
                peak_bytes=row.peak_bytes,
                capture_s=None if name in (EAGER, PLAIN) else row.capture_s,
                compile_s=max(row.first_s - medians[name], 0.0) if compiled else None,
                compile_cached=row.cached if compiled else None,
                flops=ready[DENSE].built.flops if name in (EAGER, PLAIN) else row.built.flops,
                sites=row.built.sites,
            )
        )
    return tuple(table)


def _shapes(arguments: Mapping[str, Any]) -> dict[str, list[int]]:
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    return {
        ".".join(re.findall(r"\w+", pytree.keystr(path))): list(leaf.shape)
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }
