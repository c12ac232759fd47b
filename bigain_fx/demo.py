"""``bigain-fx demo``: the embedded denoisers, dense and compressed, generating and classifying digits, timed."""

from __future__ import annotations

import math
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from bigain_fx import demo_onnx, demo_report, embedded
from bigain_fx.classify import DiffusionClassifier
from bigain_fx.compilers import check_works
from bigain_fx.demo_report import Variant
from bigain_fx.denoiser import optimize
from bigain_fx.deploy import onnx_missing
from bigain_fx.embedded.data import Images, data_set
from bigain_fx.passes.checks import told
from bigain_fx.passes.errors import InputError, first_line
from bigain_fx.passes.grammar import parse
from bigain_fx.pictures import as_text
from bigain_fx.sample import predict, sample
from bigain_fx.stopwatch import interleaved

METHODS = ("dense", "bigain-tm:0.7", "bigain-td:2")
SEED = 0
COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass(frozen=True)
class Budget:
    """How much the demo does of everything.

    Attributes:
        models: embedded denoisers.
        exported: those of them that ONNX Runtime runs as well.
        batch: rows of every denoiser call.
        rows: rows of the ten digits to generate.
        steps, guidance: of the sampler.
        images, pairs: held-out digits to classify (ten of them are one of each class), and pairs for each.
        rounds: timed calls of each variant.
    """

    models: tuple[str, ...] = ("mnist-dit", "mnist-unet")
    exported: tuple[str, ...] = ("mnist-dit",)
    batch: int = 20
    rows: int = 2
    steps: int = 12
    guidance: float = 2.0
    images: int = 30
    pairs: int = 4
    rounds: int = 9


FULL = Budget()
QUICK = Budget(models=("mnist-dit",), exported=(), rows=1, images=20)


def run(out: Path, quick: bool = False, backend: str = "inductor") -> dict[str, Any]:
    """Measure every variant, then write ``report.md``, ``report.json`` and pictures into the folder ``out``.

    Nothing is written into ``out`` before all is measured; what an earlier run left there is replaced file by file.

    Args:
        out: made if it is not there.
        quick: one denoiser, fewer images, no ONNX: about a minute and a half on two cores, not four.
        backend: anything ``torch.compile`` takes; ``"eager"`` needs no compiler.

    Returns:
        The content of ``report.json``.

    Raises:
        InputError: ``out`` is a file or cannot be written, ``backend`` is unknown or lacks its compiler.
    """
    check_backend(backend)
    console, started = Console(), time.perf_counter()
    budget = QUICK if quick else FULL
    make_folder(out)
    chosen = data_set("mnist").held_out.first(budget.images)
    no_onnx = onnx_missing() if budget.exported else "a quick run leaves them out"
    if no_onnx:
        console.print(f"no ONNX rows: {no_onnx}", soft_wrap=True, markup=False)
    with Stages(*COLUMNS, console=console, disable=not console.is_terminal) as stages:
        found = {
            name: measure(name, budget, chosen, backend, stages, onnx=name in budget.exported and not no_onnx)
            for name in budget.models
        }
    measured = {name: variants for name, (variants, _) in found.items()}
    onnx_rows = {name: rows for name, (_, rows) in found.items()}
    seconds = time.perf_counter() - started
    settings = {"quick": quick, "backend": backend, "seed": SEED, **asdict(budget)}
    summary = demo_report.summarize(measured, onnx_rows, chosen.labels, settings | {"no_onnx": no_onnx}, seconds)
    pictures = {name: [variant.generated for variant in variants] for name, variants in measured.items()}
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as staging:
        demo_report.write(Path(staging), summary, pictures)
        for path in sorted(Path(staging).iterdir(), key=lambda path: (path.stem == "report", path.name)):
            os.replace(path, out / path.name)  # the report last: what it shows is there
    demo_report.show(console, summary)
    console.print(f"{seconds:.0f} s; the report: {out / 'report.md'}", soft_wrap=True)
    return summary


class Stages(Progress):
    """A bar for each stage, or a line when it begins where there is no terminal."""

    def begin(self, stage: str, total: int) -> Callable[[], None]:
        """Begin ``stage``; return what to call after each of its ``total`` steps."""
        if self.disable:
            self.console.print(f"{stage} ...", soft_wrap=True, markup=False)
        return partial(self.advance, self.add_task(stage, total=total))


def measure(
    name: str, budget: Budget, data: Images, backend: str, stages: Stages, *, onnx: bool
) -> tuple[list[Variant], list[dict[str, Any]]]:
    """Optimize the embedded denoiser ``name`` by each of :data:`METHODS` and measure the variants side by side.

    Returns:
        The variants; and rows of what ONNX Runtime runs, none without ``onnx``.
    """
    bundle = embedded.load(name)
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.arange(budget.batch) % len(data)
    timesteps = torch.linspace(0, bundle.scheduler.config.num_train_timesteps - 1, budget.batch).long()
    noise = torch.randn((budget.batch, *bundle.sample_shape), generator=generator)
    noisy = bundle.scheduler.add_noise(data.images[rows], noise, timesteps)
    call = partial(
        predict, condition=bundle.condition, x=noisy, timesteps=timesteps, labels=data.labels[rows], batch=budget.batch
    )  # fmt: skip

    labels = torch.arange(10).repeat(budget.rows)
    start = torch.randn((len(labels), *bundle.sample_shape), generator=generator)
    calls = budget.steps * math.ceil(2 * len(labels) / budget.batch)

    def generate(denoiser: nn.Module, progress: Callable[[], None]) -> Tensor:
        images = sample(
            denoiser, bundle, labels, steps=budget.steps, guidance=budget.guidance, noise=start, batch=budget.batch,
            progress=progress,
        )  # fmt: skip
        return images.clamp(-1, 1)

    first = generate(bundle.model, stages.begin(f"{name}: the first digits, dense and not compiled", calls))
    stages.console.print(as_text(first[:10]), markup=False, highlight=False)

    done = stages.begin(f"{name}: {'trace' if backend == 'eager' else 'compile'}", len(METHODS))
    variants, outputs, compile_seconds = [], [], []
    for method in METHODS:
        started = time.perf_counter()
        variants.append(optimize(bundle.model, method=parse(method), backend=backend))
        outputs.append(call(variants[-1]))
        compile_seconds.append(time.perf_counter() - started)
        done()

    exported = []
    if onnx:
        done = stages.begin(f"{name}: export to ONNX", 1)
        exported = demo_onnx.export(bundle, call, (noisy, timesteps, data.labels[rows]))
        done()

    timed = [*variants, *(item.denoiser for item in exported)]
    done = stages.begin(f"{name}: time", (1 + budget.rounds) * len(timed))
    seconds = interleaved([partial(call, denoiser, progress=done) for denoiser in timed], budget.rounds)
    call_seconds, onnx_seconds = seconds[: len(variants)], seconds[len(variants) :]

    done = stages.begin(f"{name}: generate", calls * len(METHODS))
    generated = [generate(variant, done) for variant in variants]

    calls = math.ceil(len(data) * budget.pairs * bundle.num_classes / budget.batch)
    done = stages.begin(f"{name}: classify", calls * len(METHODS))
    classified = [
        DiffusionClassifier(
            variant, bundle.scheduler, bundle.condition(torch.arange(bundle.num_classes)), n_samples=(budget.pairs,),
            to_keep=(1,), batch=budget.batch, seed=SEED,
        )(data.images, progress=done)
        for variant in variants
    ]  # fmt: skip
    reports = [variant.report for variant in variants]
    columns = zip(METHODS, reports, compile_seconds, call_seconds, outputs, generated, classified, strict=True)
    measured = [Variant(*column) for column in columns]
    return measured, demo_onnx.summarize(exported, onnx_seconds, measured)


def check_backend(backend: str) -> None:
    """Refuse a backend that cannot work here, before minutes are spent on it.

    Raises:
        InputError: ``torch.compile`` does not know it, or inductor has no C++ compiler or no Python headers.
    """
    check_works(backend)
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


def make_folder(out: Path) -> None:
    """Make the folder ``out`` if it is not there, before minutes are spent on what goes into it.

    Raises:
        InputError: it is a file, or cannot be made or written to.
    """
    if os.path.exists(out) and not out.is_dir():
        raise InputError(f"out={str(out)!r} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{told('out', str(out))} cannot be made ({first_line(error)}); name another folder"
        ) from error
    if not os.access(out, os.W_OK):
        raise InputError(f"out={str(out)!r} cannot be written to; name another folder")
