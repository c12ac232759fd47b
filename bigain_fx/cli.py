"""The command line: ``bigain-fx`` and its commands."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bigain_fx.passes.errors import BigainError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

SUBJECT_HELP = "mnist-dit, mnist-unet, photo-dit, photo-unet, or the folder of a Stable Diffusion or DiT pipeline"
PROMPTS_HELP = "one for each class, separated by '|'; of a pipeline only"
MODEL_HELP = "mnist-dit, mnist-unet, sd2, sdxl, dit-xl-2, pixart, sd3, flux, or a diffusers folder"
METHODS_HELP = (
    "dense, tome:RATIO[:block], bigain-tm:RATIO[:block], todo:FACTOR, bigain-td:FACTOR[:ALPHA or :NOISY..CLEAN]; "
    "'+' joins two"
)


class Dtype(StrEnum):
    """Names of the dtypes that a denoiser runs in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def _root() -> None:
    """Token compression for diffusion denoisers, as a graph rewrite."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the report and the pictures")] = Path("bigain-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="fewer digits and steps")] = False,
    backend: Annotated[str, typer.Option(help="torch.compile backend, or eager")] = "inductor",
) -> None:
    """Optimize the embedded denoisers, generate and classify digits with each, and leave a report."""
    from bigain_fx import demo as module

    module.run(out, quick=quick, backend=backend)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    method: Annotated[str, typer.Option("--methods", help=METHODS_HELP)] = "bigain-tm:0.7",
    size: Annotated[int | None, typer.Option(help="side of the latent, in pixels")] = None,
    batch: Annotated[int, typer.Option(help="samples a call")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Show every attention of MODEL, what each method would do to it, and its FLOPs. Needs no weights and no memory."""
    from rich.console import Console
    from rich.table import Table

    import bigain_fx as bgx
    from bigain_fx.models import load
    from bigain_fx.passes.grammar import parse_list
    from bigain_fx.report import COLUMNS

    methods = parse_list(method)
    workload = load(model, size=size, batch=batch, device="meta")
    reports = [
        bgx.inspect(workload.model, workload.args, workload.kwargs, method=m, grid=workload.grid)
        for m in methods.values()
    ]
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=1))
        return
    console = Console()
    for report in reports:
        table = Table(*COLUMNS, title=report.headline, title_justify="left")
        for row in report.rows():
            table.add_row(*row, style=None if row[1] == "kept" else "bold")
        console.print(table)


class Format(StrEnum):
    """What a denoiser is exported to."""

    onnx = "onnx"
    pt2 = "pt2"


@app.command()
def export(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    format: Annotated[Format, typer.Option(help="an ONNX graph, or a package that AOTInductor compiles")] = Format.onnx,
    methods: Annotated[str, typer.Option(help=METHODS_HELP + "; ',' lists, a file for each")] = "bigain-tm:0.7",
    size: Annotated[int | None, typer.Option(help="side of the latent, in pixels")] = None,
    batch: Annotated[int, typer.Option(help="samples a call")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="of weights and inputs")] = Dtype.float32,
    opset: Annotated[int, typer.Option(help="of ONNX's operators, 18 to 23")] = 20,
    attention: Annotated[str, typer.Option(help="MultiHeadAttention (ONNX Runtime's), or standard")] = (
        "MultiHeadAttention"
    ),
    verify: Annotated[bool, typer.Option(help="run each ONNX file and compare it with torch")] = True,
    out: Annotated[Path, typer.Option(help="folder for the files")] = Path("bigain-export"),
    lint_only: Annotated[
        Path | None, typer.Option(help="export nothing; name what CUDA would leave to the CPU in this ONNX file")
    ] = None,
) -> None:
    """Write MODEL, its attentions compressed, as an ONNX graph or an ahead-of-time compiled package."""
    if lint_only is not None:
        if model is not None:
            raise typer.BadParameter("MODEL and --lint-only do not go together", param_hint="MODEL")
        raise typer.Exit(_lint(lint_only))
    if model is None:
        raise typer.BadParameter("MODEL is missing; name one, or a file with --lint-only", param_hint="MODEL")
    import torch

    import bigain_fx as bgx
    from bigain_fx.demo import make_folder
    from bigain_fx.deploy import check_options
    from bigain_fx.models import load
    from bigain_fx.passes.errors import InputError
    from bigain_fx.passes.grammar import parse_list

    parsed = parse_list(methods)
    if format == Format.onnx:
        check_options(opset, attention)
    elif (opset, attention, verify) != (20, "MultiHeadAttention", True):
        raise InputError(f"--opset, --attention and --no-verify say nothing of --format {format}; leave them out")
    workload = load(model, size=size, batch=batch, dtype=getattr(torch, dtype))
    make_folder(out)
    for text, method in parsed.items():
        path = out / f"{Path(model).resolve().name}-{text.replace(':', '-')}.{format}"
        if format == Format.onnx:
            print(
                bgx.export_onnx(
                    workload.model, workload.args, path, kwargs=workload.kwargs, method=method, opset=opset,
                    attention=attention, verify=verify,
                )
            )  # fmt: skip
        else:
            report = bgx.export_package(workload.model, workload.args, path, kwargs=workload.kwargs, method=method)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; {report.headline}")


def _lint(path: Path) -> int:
    """Print what would fall back; the exit status, 1 if something would."""
    from bigain_fx.deploy import onnx_missing
    from bigain_fx.passes.errors import InputError

    if reason := onnx_missing():
        raise InputError(reason)
    from bigain_fx.export.lint import lint

    findings = lint(path)
    for finding in findings:
        print(f"{finding.node} ({finding.op}): {finding.reason}")
    print(f"{path}: {len(findings) or 'none'} of the nodes would fall back from CUDA to the CPU")
    return 1 if findings else 0


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    methods: Annotated[str, typer.Option(help=METHODS_HELP + "; ',' lists")] = (
        "dense,tome:0.7,bigain-tm:0.7,todo:2,bigain-td:2"
    ),
    size: Annotated[int | None, typer.Option(help="side of the latent, in pixels")] = None,
    batch: Annotated[int, typer.Option(help="samples a call")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="of weights and inputs")] = Dtype.float32,
    onnx: Annotated[str, typer.Option(help="what to time through ONNX Runtime too, likewise; '' for nothing")] = (
        "dense,bigain-tm:0.7"
    ),
    rounds: Annotated[int, typer.Option(help="interleaved timed rounds")] = 7,
    backend: Annotated[str, typer.Option(help="torch.compile backend, or eager")] = "inductor",
    out: Annotated[Path, typer.Option(help="folder for the JSON and the Markdown")] = Path("bigain-bench"),
) -> None:
    """Time dense against compressed, compiled, side by side, with the free bound of each kind."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's chatter would break the progress bar
    import torch

    from bigain_fx.bench.run import run
    from bigain_fx.models import load
    from bigain_fx.passes.errors import InputError
    from bigain_fx.passes.grammar import parse_list

    parsed, exported = parse_list(methods), parse_list(onnx) if onnx else {}
    if device not in ("cpu", "cuda"):
        raise InputError(f"device={device!r} must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda': torch sees no CUDA device here; use --device cpu")
    workload = load(model, size=size, batch=batch, device=device, dtype=getattr(torch, dtype))
    result = run(workload, parsed, onnx=exported, rounds=rounds, backend=backend, out=out)
    print(result.to_markdown())


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=SUBJECT_HELP)],
    method: Annotated[str, typer.Option("--methods", help=METHODS_HELP)] = "dense",
    prompts: Annotated[str, typer.Option(help=PROMPTS_HELP)] = "",
    count: Annotated[int, typer.Option(help="images for each method, the classes in turn")] = 10,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    guidance: Annotated[float, typer.Option(help="scale of classifier-free guidance; 1 is none")] = 2.0,
    batch: Annotated[int, typer.Option(help="rows of a denoiser call")] = 20,
    seed: Annotated[int, typer.Option(help="of the noise, the same for every method")] = 0,
    backend: Annotated[str, typer.Option(help="torch.compile backend, or eager")] = "inductor",
    out: Annotated[Path, typer.Option(help="folder for the PNG files")] = Path("bigain-generated"),
) -> None:
    """Generate images with MODEL, and leave them as METHOD-NUMBER-CLASS.png."""
    from bigain_fx import commands
    from bigain_fx.passes.grammar import parse_list

    commands.generate(
        model, parse_list(method), _split(prompts), count=count, steps=steps, guidance=guidance, batch=batch,
        seed=seed, backend=backend, out=out,
    )  # fmt: skip


@app.command()
def classify(
    model: Annotated[str, typer.Argument(help=SUBJECT_HELP)],
    images: Annotated[list[Path], typer.Argument(help="image files")],
    method: Annotated[str, typer.Option("--method", help=METHODS_HELP)] = "dense",
    prompts: Annotated[str, typer.Option(help=PROMPTS_HELP)] = "",
    samples: Annotated[str, typer.Option(help="pairs of timestep and noise for each class, round by round")] = "5,20",
    keep: Annotated[str, typer.Option(help="classes that are left after each round")] = "5,1",
    batch: Annotated[int, typer.Option(help="rows of a denoiser call")] = 20,
    seed: Annotated[int, typer.Option(help="of the pairs")] = 0,
    backend: Annotated[str, typer.Option(help="torch.compile backend, or eager")] = "inductor",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Say which class of MODEL each image is, by the denoising error under each."""
    from bigain_fx import commands
    from bigain_fx.passes.grammar import parse

    commands.classify(
        model, images, parse(method), _split(prompts), n_samples=_numbers("samples", samples),
        to_keep=_numbers("keep", keep), batch=batch, seed=seed, backend=backend, as_json=as_json,
    )  # fmt: skip


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help=SUBJECT_HELP)],
    methods: Annotated[str, typer.Option(help=METHODS_HELP + "; ',' lists")] = (
        "dense,tome:0.7,bigain-tm:0.7,todo:2,bigain-td:2"
    ),
    data: Annotated[
        str | None,
        typer.Option(
            help="imagenet-1k, imagenet-100, pets, coco, a folder of images, or parquet; an embedded model has its own"
        ),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="whose format and prompts a folder or parquet follows")] = None,
    images: Annotated[int, typer.Option(help="images to classify")] = 500,
    generated: Annotated[int, typer.Option("--generate", help="images to generate, for FID; 0 for none")] = 500,
    samples: Annotated[str, typer.Option(help="pairs of timestep and noise for each class, round by round")] = "4,12",
    keep: Annotated[str, typer.Option(help="classes that are left after each round")] = "5,1",
    steps: Annotated[int, typer.Option(help="denoising steps of a generated image")] = 20,
    guidance: Annotated[float, typer.Option(help="scale of classifier-free guidance; 1 is none")] = 2.0,
    batch: Annotated[int, typer.Option(help="rows of a denoiser call")] = 20,
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="time every method side by side")] = True,
    backend: Annotated[str, typer.Option(help="torch.compile backend, or eager")] = "inductor",
    out: Annotated[Path, typer.Option(help="folder for the report and what it is made of")] = Path("bigain-evaluation"),
) -> None:
    """Measure what each method costs in accuracy and FID. Stopped half way, the same command goes on from there."""
    from bigain_fx.evidence import run
    from bigain_fx.evidence.evaluate import Settings
    from bigain_fx.passes.grammar import parse_list

    settings = Settings(_numbers("samples", samples), _numbers("keep", keep), batch, steps, guidance, seed)
    run.evaluate(
        model, parse_list(methods), out, data=data, kind=kind, images=images, generate=generated, settings=settings,
        backend=backend, timed=timed,
    )  # fmt: skip


def _split(prompts: str) -> tuple[str, ...]:
    return tuple(prompt.strip() for prompt in prompts.split("|")) if prompts else ()


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from bigain_fx.passes.errors import InputError

    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"{name}={text!r} must be whole numbers, separated by commas, such as 5,20") from None


def main() -> None:
    """Entry point: errors of ours are one line on standard error and exit status 2."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except BigainError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
