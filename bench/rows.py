"""Building the rows of a benchmark: each is made, compiled, called once and compared with the dense model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bigain_fx import Report, optimize
from bigain_fx.bench import BenchError, bound, onnx_rows, timing, tomesd_rows
from bigain_fx.passes.errors import BigainError, first_line
from bigain_fx.passes.methods import Methods, ToMe
from bigain_fx.stopwatch import synchronizer

if TYPE_CHECKING:
    from bigain_fx.models import Workload

EAGER, PLAIN, DENSE, ONNX, TOMESD, AS_EAGER = "dense eager", "torch.compile", "dense", "onnx:", "tomesd:", " eager"


@dataclass(frozen=True)
class Asked:
    """Which rows there are to be beside the dense ones; the arguments are those of ``run``."""

    methods: Mapping[str, Methods]
    eager: Mapping[str, Methods]
    onnx: Mapping[str, Methods]
    tomesd: Sequence[float]
    backend: str
    mode: str | None

    def bounds(self) -> dict[str, str | None]:
        """Name of the free bound of each row that may have one."""
        found = {name: bound.bound_name(given) for name, given in self.methods.items()}
        return found | {f"{TOMESD}{ratio:g}": bound.bound_name((ToMe(ratio),)) for ratio in self.tomesd}


@dataclass(frozen=True)
class Built:
    """One row before its first call, and what runs it: ``"eager"``, ``"compiled"`` or ``"onnx"``.

    ``flops`` are those of its graph; it changes ``sites`` attentions, the largest of ``tokens`` image tokens.
    """

    call: Callable[[], Any]
    kind: str
    flops: int = 0
    sites: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, call: Callable[[], Any], kind: str, report: Report) -> Built:
        """With the numbers of ``report``."""
        tokens = max((site.tokens for site in report.rewritten), default=0)
        return cls(call, kind, report.flops_after, len(report.rewritten), tokens)


@dataclass(frozen=True)
class Ready:
    """One row that is compiled, checked and ready to be timed."""

    built: Built
    relative_l2: float | None
    peak_bytes: int | None
    capture_s: float
    first_s: float
    cached: bool


def possible(workload: Workload, asked: Asked) -> tuple[Asked, list[str]]:
    """What of ``asked`` can be had here, and a line for each kind of rows that cannot."""
    notes = []
    if asked.onnx and (reason := onnx_rows.refuse(workload)):
        asked = replace(asked, onnx={})
        notes.append(f"no ONNX rows: {reason}")
    if asked.tomesd and (reason := tomesd_rows.refuse(workload)):
        asked = replace(asked, tomesd=())
        notes.append(f"no tomesd rows: {reason}")
    return asked, notes


def builders(workload: Workload, asked: Asked, folder: Path) -> Iterator[tuple[str, Callable[[], Built]]]:
    """Name of each row, and what builds it, without the bounds.

    Args:
        workload: the denoiser and its inputs.
        asked: which rows.
        folder: where ONNX files go.
    """
    backend, mode = asked.backend, asked.mode
    eager = partial(workload.model, *workload.args, **workload.kwargs)

    def optimized(given: Methods, backend: str) -> Built:
        fast = optimize(workload.model, workload.args, workload.kwargs, method=given, backend=backend, mode=mode)
        return Built.of(partial(fast, *workload.args, **workload.kwargs), _kind(backend), fast.report)

    def plain() -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(workload.model, dynamic=False, backend=backend, mode=mode)
        return compiled

    def exported(given: Methods) -> Built:
        call, report = onnx_rows.build(workload, given, folder)
        return Built.of(call, "onnx", report)

    def peer(ratio: float, backend: str) -> Built:
        if ratio not in patched:
            patched[ratio] = tomesd_rows.patch(workload, ratio)
        return Built.of(patched[ratio].call(backend, mode), _kind(backend), patched[ratio].report)

    patched: dict[float, tomesd_rows.Patched] = {}
    yield EAGER, lambda: Built(eager, "eager")
    if backend != "eager":
        yield PLAIN, lambda: Built(partial(plain(), *workload.args, **workload.kwargs), "compiled")
    yield DENSE, partial(optimized, (), backend)
    for name, given in asked.methods.items():
        if given:
            yield name, partial(optimized, given, backend)
    for name, given in asked.eager.items():
        if given:
            yield name + AS_EAGER, partial(optimized, given, "eager")
    for ratio in asked.tomesd:
        yield f"{TOMESD}{ratio:g}{AS_EAGER}", partial(peer, ratio, "eager")
        yield f"{TOMESD}{ratio:g}", partial(peer, ratio, backend)
    for name, given in asked.onnx.items():
        yield ONNX + name, partial(exported, given)


def bound_builders(
    workload: Workload, asked: Asked, ready: Mapping[str, Ready]
) -> Iterator[tuple[str, Callable[[], Built]]]:
    """Likewise the bounds: one for all methods that share it, of those that changed something."""

    def free(given: Methods) -> Built:
        built = bound.build(workload, given, backend=asked.backend, mode=asked.mode)
        return Built(built.call, _kind(asked.backend), built.flops, built.sites)

    changed = {name: given for name, given in asked.methods.items() if given and ready[name].built.sites}
    for name, given in {bound.bound_name(given): given for given in changed.values()}.items():
        assert name is not None, "a method that changed something has a bound"
        yield name, partial(free, given)


def prepare(
    name: str, build: Callable[[], Built], reference: Sequence[Tensor], device: torch.device, backend: str
) -> Ready:
    """Build one row, make its first call (which compiles it), and measure what needs no repetition.

    Raises:
        BenchError: it cannot be built or called, or its output is not finite or of another shape than ``reference``.
        BigainError: whatever ``build`` raises of that kind.
    """
    hits = _cache_hits()
    start = time.perf_counter()
    try:
        built = build()
        captured = time.perf_counter()
        output = built.call()
        synchronizer(device)()
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
    return Ready(built, relative, peak, captured - start, first_s, _cache_hits() > hits)


def _kind(backend: str) -> str:
    return "eager" if backend == "eager" else "compiled"


def _cache_hits() -> int:
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
