"""Run a benchmark: build and compile every row, then time all of them interleaved."""

from __future__ import annotations

import datetime
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from bigain_fx import optimize
from bigain_fx.bench import BenchError, bound, onnx_rows, result, timing
from bigain_fx.bench.result import BenchResult, Row
from bigain_fx.capture import CallBinder
from bigain_fx.passes.errors import BigainError, first_line
from bigain_fx.passes.methods import Methods

if TYPE_CHECKING:
    from bigain_fx.models import Workload

EAGER, DENSE, ONNX = "dense eager", "dense", "onnx:"


@dataclass(frozen=True)
class _Built:
    """One row before its first call, and what runs it: ``"eager"``, ``"compiled"`` or ``"onnx"``."""

    call: Callable[[], Any]
    kind: str
    flops: int
    sites: int


@dataclass(frozen=True)
class _Ready:
    """One row that is compiled, checked and ready to be timed."""

    built: _Built
    relative_l2: float | None
    peak_bytes: int | None
    capture_s: float
    first_s: float
    cached: bool


def run(
    workload: Workload,
    methods: Mapping[str, Methods],
    *,
    onnx: Mapping[str, Methods] | None = None,
    rounds: int = 7,
    warmup: int = 1,
    backend: str = "inductor",
    mode: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> BenchResult:
    """Time ``workload`` dense eager, dense compiled, with each method, and with the free bound of each method.

    Args:
        workload: a denoiser in eval mode, and the inputs to call it with.
        methods: as :func:`bigain_fx.passes.methods.parse_list` returns them; entries that are dense add nothing, since
            both dense rows are always there.
        onnx: what to time through ONNX Runtime as well, likewise; where that is not to be had, a line says so. Each
            holds its own copy of the weights.
        rounds: timed calls of each row.
        warmup: rounds before those, after the first call of each row.
        backend, mode: as for ``torch.compile``; ``"eager"`` runs the graphs as they are.
        out: folder for ``<stem>.json`` and ``<stem>.md``, made if need be; older ones of that name are replaced.
        seed: of the bootstrap.
        progress: show a bar on standard error.

    Raises:
        BenchError: an argument that cannot be, ``out`` that cannot be written, a graph that does not compile, or an
            output that is not finite.
        BigainError: whatever :func:`bigain_fx.optimize` raises.
    """
    exported = _exportable(workload, onnx or {})
    _check_arguments(workload, methods, rounds, warmup)
    if out is not None:
        result.prepare(out)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    device = next(workload.model.parameters()).device
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not progress,
    )  # fmt: skip
    with bar, torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        ready = _prepare_all(workload, methods, exported, backend, mode, device, bar, Path(folder))
        task = bar.add_task("time", total=(warmup + rounds) * len(ready))
        seconds = timing.interleave(
            {name: row.built.call for name, row in ready.items()}, rounds, warmup, check=timing.check_finite,
            synchronize=_synchronizer(device), tick=lambda: bar.advance(task),
        )  # fmt: skip
    bounds = {name: bound.bound_name(given) for name, given in methods.items()}
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
        rows=_rows(ready, seconds, bounds, seed),
    )
    if out is not None:
        result.write(out / f"{found.stem}.json", json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
        result.write(out / f"{found.stem}.md", found.to_markdown())
    return found


def _exportable(workload: Workload, onnx: Mapping[str, Methods]) -> Mapping[str, Methods]:
    """``onnx`` itself, or nothing where ONNX Runtime cannot run ``workload``; then the reason is printed."""
    reason = onnx_rows.refuse(workload) if onnx else None
    if reason:
        Console(stderr=True).print(f"no ONNX rows: {reason}", soft_wrap=True, markup=False)
    return {} if reason else onnx


def _check_arguments(workload: Workload, methods: Mapping[str, Methods], rounds: int, warmup: int) -> None:
    if rounds < 1:
        raise BenchError(f"rounds={rounds!r} must be at least 1")
    if warmup < 0:
        raise BenchError(f"warmup={warmup!r} must be 0 or more")
    for name, given in methods.items():
        if given and (name in (EAGER, DENSE) or name.startswith(("bound:", ONNX))):
            raise BenchError(f"methods has {name!r}, the name of a row that is not a method; call it something else")
    weight = next(workload.model.parameters(), None)
    if weight is None or weight.is_meta:
        raise BenchError(f"model {workload.name!r} has no weights in memory; load it on cpu or cuda")


def _prepare_all(
    workload: Workload,
    methods: Mapping[str, Methods],
    onnx: Mapping[str, Methods],
    backend: str,
    mode: str | None,
    device: torch.device,
    bar: Progress,
    folder: Path,
) -> dict[str, _Ready]:
    """Build, compile and check every row, one after another; a bound only where its method changed something."""
    kind = "eager" if backend == "eager" else "compiled"
    eager = partial(workload.model, *workload.args, **workload.kwargs)

    def optimized(given: Methods) -> _Built:
        fast = optimize(workload.model, workload.args, workload.kwargs, method=given, backend=backend, mode=mode)
        call = partial(fast, *workload.args, **workload.kwargs)
        return _Built(call, kind, fast.report.flops_after, len(fast.report.rewritten))

    def free(given: Methods) -> _Built:
        built = bound.build(workload, given, backend=backend, mode=mode)
        return _Built(built.call, kind, built.flops, built.sites)

    def exported(given: Methods) -> _Built:
        call, report = onnx_rows.build(workload, given, folder)
        return _Built(call, "onnx", report.flops_after, len(report.rewritten))

    def prepare(name: str, build: Callable[[], _Built]) -> None:
        bar.update(task, description=f"build {name}")
        ready[name] = _prepare(name, build, reference, device, backend)
        bar.advance(task)

    applied = {name: given for name, given in methods.items() if given}
    bounds_at_most = len({*map(bound.bound_name, applied.values())} - {None})
    task = bar.add_task("build", total=2 + len(applied) + bounds_at_most + len(onnx))
    ready: dict[str, _Ready] = {}
    reference = timing.tensors_of(eager())
    prepare(EAGER, lambda: _Built(eager, "eager", 0, 0))
    prepare(DENSE, partial(optimized, ()))
    for name, given in applied.items():
        prepare(name, partial(optimized, given))
    bounds = {bound.bound_name(given): given for name, given in applied.items() if ready[name].built.sites}
    for name_of_bound, given in bounds.items():
        assert name_of_bound is not None, "a method that changed something has a bound"
        prepare(name_of_bound, partial(free, given))
    for name, given in onnx.items():
        prepare(ONNX + name, partial(exported, given))
    bar.update(task, description="built", total=len(ready))
    return ready


def _prepare(
    name: str, build: Callable[[], _Built], reference: Sequence[Tensor], device: torch.device, backend: str
) -> _Ready:
    """Build one row, make its first call (which compiles it), and measure what needs no repetition."""
    hits = _cache_hits()
    start = time.perf_counter()
    try:
        built = build()
        captured = time.perf_counter()
        output = built.call()
        _synchronizer(device)()
    except BigainError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise BenchError(f"row {name!r} fails with backend={backend!r}: {reason}; try backend 'eager'") from error
    first_s = time.perf_counter() - captured
    timing.check_finite(name, output)
    relative = timing.relative_error(reference, timing.tensors_of(output))
    del output
    peak = None if built.kind == "onnx" else timing.peak_bytes(built.call, device)  # torch does not see ONNX Runtime's
    return _Ready(built, relative, peak, captured - start, first_s, _cache_hits() > hits)


def _rows(
    ready: Mapping[str, _Ready], seconds: Mapping[str, Sequence[float]], bounds: Mapping[str, str | None], seed: int
) -> tuple[Row, ...]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    onnx_base = ONNX + DENSE if ONNX + DENSE in ready else DENSE
    bases = {name: onnx_base if name.startswith(ONNX) and name != onnx_base else DENSE for name in ready}
    speedups = {name: timing.speedup(seconds[bases[name]], values, seed) for name, values in seconds.items()}
    rows = []
    for name, row in ready.items():
        limit = bounds.get(name) if row.built.sites else None
        efficiency = None
        if limit is not None and speedups[limit].low > 1:
            efficiency = (medians[DENSE] - medians[name]) / (medians[DENSE] - medians[limit])
        eager, compiled = name == EAGER, row.built.kind == "compiled"
        rows.append(
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
                capture_s=None if eager else row.capture_s,
                compile_s=max(row.first_s - medians[name], 0.0) if compiled else None,
                compile_cached=row.cached if compiled else None,
                flops=ready[DENSE].built.flops if eager else row.built.flops,
                sites=row.built.sites,
            )
        )
    return tuple(rows)


def _cache_hits() -> int:
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return partial(torch.cuda.synchronize, device)
    return lambda: None


def _shapes(arguments: Mapping[str, Any]) -> dict[str, list[int]]:
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    return {
        ".".join(re.findall(r"\w+", pytree.keystr(path))): list(leaf.shape)
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }
