"""``bigain-fx demo``: the embedded denoisers, dense and compressed, generating and classifying digits, timed."""

from __future__ import annotations

import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from bigain_fx import demo_report, embedded
from bigain_fx.classify import Classification, classify
from bigain_fx.denoiser import OptimizedDenoiser, optimize
from bigain_fx.embedded.data import Digits, digits
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.methods import parse
from bigain_fx.report import Report
from bigain_fx.sample import predict, sample

METHODS = ("dense", "bigain-tm:0.7", "bigain-td:2")
SEED = 0
COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass(frozen=True)
class Budget:
    """How much the demo does of everything.

    Attributes:
        models: embedded denoisers.
        batch: rows of every denoiser call.
        rows: rows of the ten digits to generate.
        steps, guidance: of the sampler.
        images, pairs: held-out digits to classify (ten of them are one of each class), and pairs for each.
        rounds: timed calls of each variant.
    """

    models: tuple[str, ...] = embedded.NAMES
    batch: int = 20
    rows: int = 2
    steps: int = 12
    guidance: float = 2.0
    images: int = 40
    pairs: int = 4
    rounds: int = 9


FULL = Budget()
QUICK = Budget(models=("mnist-dit",), rows=1, images=30)


@dataclass(frozen=True, eq=False)
class Variant:
    """One denoiser under one method, measured.

    Attributes:
        method: in the text grammar of the methods.
        report: what was done to its attentions.
        compile_seconds: from the model to the end of the first call.
        call_seconds: of the timed calls, one a round.
        output: ``(batch, C, H, W)``, of the first call, whose input all variants of a denoiser share.
        generated: ``(10 * rows, C, H, W)`` in [-1, 1].
        classification: of the held-out digits.
    """

    method: str
    report: Report
    compile_seconds: float
    call_seconds: tuple[float, ...]
    output: Tensor
    generated: Tensor
    classification: Classification


def run(out: Path, quick: bool = False, backend: str = "inductor") -> dict[str, Any]:
    """Measure every variant, then write ``report.md``, ``report.json`` and pictures into the folder ``out``.

    Nothing is written into ``out`` before all is measured; what an earlier run left there is replaced file by file.

    Args:
        out: made if it is not there.
        quick: one denoiser, fewer images: under two minutes on two cores instead of under six.
        backend: anything ``torch.compile`` takes; ``"eager"`` needs no compiler.

    Returns:
        The content of ``report.json``.

    Raises:
        InputError: ``out`` is a file or cannot be written, ``backend`` is unknown or lacks its compiler.
    """
    check_backend(backend)
    console, started = Console(), time.perf_counter()
    budget = QUICK if quick else FULL
    with _staged(out) as folder:
        _, held_out = digits()
        chosen = Digits(held_out.images[: budget.images], held_out.labels[: budget.images])
        with Progress(*COLUMNS, console=console) as progress:
            measured = {name: measure(name, budget, chosen, backend, progress) for name in budget.models}
        seconds = time.perf_counter() - started
        settings = {"quick": quick, "backend": backend, "seed": SEED, **asdict(budget)}
        summary = demo_report.summarize(measured, chosen.labels, settings, seconds)
        demo_report.write(folder, summary, {name: [v.generated for v in found] for name, found in measured.items()})
    demo_report.show(console, summary)
    console.print(f"{seconds:.0f} s; the report: {out / 'report.md'}", soft_wrap=True)
    return summary


def measure(name: str, budget: Budget, data: Digits, backend: str, progress: Progress) -> list[Variant]:
    """Optimize the embedded denoiser ``name`` by each of :data:`METHODS` and measure the variants side by side."""
    bundle = embedded.load(name)
    size, generator = budget.batch, torch.Generator().manual_seed(SEED)
    rows = torch.arange(size) % len(data)
    timesteps = torch.linspace(0, bundle.scheduler.config.num_train_timesteps - 1, size).long()
    noisy = bundle.scheduler.add_noise(
        data.images[rows], torch.randn((size, *bundle.sample_shape), generator=generator), timesteps
    )
    probe = (noisy, timesteps, data.labels[rows])

    task = progress.add_task(f"{name}: {'trace' if backend == 'eager' else 'compile'}", total=len(METHODS))
    variants: dict[str, OptimizedDenoiser] = {}
    outputs: dict[str, Tensor] = {}
    compile_seconds: dict[str, float] = {}
    for method in METHODS:
        started = time.perf_counter()
        variants[method] = optimize(bundle.model, method=parse(method), backend=backend)
        outputs[method] = predict(variants[method], bundle, *probe, batch=size)
        compile_seconds[method] = time.perf_counter() - started
        progress.advance(task)

    call_seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    task = progress.add_task(f"{name}: time", total=budget.rounds)
    for index in range(-1, budget.rounds):  # the first round warms up
        for method in METHODS[index % len(METHODS) :] + METHODS[: index % len(METHODS)]:
            started = time.perf_counter()
            predict(variants[method], bundle, *probe, batch=size)
            if index >= 0:
                call_seconds[method].append(time.perf_counter() - started)
        progress.update(task, completed=index + 1)

    labels = torch.arange(10).repeat(budget.rows)
    noise = torch.randn((len(labels), *bundle.sample_shape), generator=generator)
    calls = budget.steps * -(-2 * len(labels) // size)
    task = progress.add_task(f"{name}: generate", total=calls * len(METHODS))
    generated = {
        method: sample(
            variants[method], bundle, labels, steps=budget.steps, guidance=budget.guidance, noise=noise, batch=size,
            progress=partial(progress.advance, task),
        )
        for method in METHODS
    }  # fmt: skip

    calls = -(-len(data) * budget.pairs * bundle.num_classes // size)
    task = progress.add_task(f"{name}: classify", total=calls * len(METHODS))
    classified = {
        method: classify(
            variants[method], bundle, data.images, pairs=budget.pairs, batch=size, seed=SEED,
            progress=partial(progress.advance, task),
        )
        for method in METHODS
    }  # fmt: skip
    return [
        Variant(
            method, variants[method].report, compile_seconds[method], tuple(call_seconds[method]), outputs[method],
            generated[method], classified[method],
        )
        for method in METHODS
    ]  # fmt: skip


def check_backend(backend: str) -> None:
    """Refuse a backend that cannot work here, before minutes are spent on it.

    Raises:
        InputError: ``torch.compile`` does not know it, or inductor has no C++ compiler or no Python headers.
    """
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        lookup_backend(backend)
    except InvalidBackend:
        raise InputError(f"backend={backend!r} is not known to torch.compile; choose inductor or eager") from None
    if backend == "inductor" and (missing := _missing_for_inductor()):
        raise InputError(f"backend='inductor' needs {missing}, not found here; install it, or run with --backend eager")


def _missing_for_inductor() -> str | None:
    """What inductor's CPU code lacks on this machine: its kernels are C++ that includes Python.h."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (g++, or the one that CXX names)"
    folders = {sysconfig.get_path("include"), sysconfig.get_path("include", scheme="posix_prefix")}
    if os.name == "posix" and not any((Path(folder) / "Python.h").exists() for folder in folders):
        return "the headers of Python (Python.h; python3-dev on Debian)"
    return None


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder whose files move into ``out`` at the end, the report last, and vanish if anything fails."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out={str(out)!r} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out)
    except OSError as error:
        raise InputError(f"out={str(out)!r} cannot be written to ({error.strerror}); name another folder") from error
    with staging as folder:
        yield Path(folder)
        for path in sorted(Path(folder).iterdir(), key=lambda path: (path.stem == "report", path.name)):
            os.replace(path, out / path.name)
