"""The command line: ``bigain-fx`` and its commands."""

from __future__ import annotations

import json
import logging
import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bigain_fx.cli_evidence import app as evidence
from bigain_fx.command_line import ending_well
from bigain_fx.passes.grammar import SYNTAX

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(evidence)

MODEL_HELP = (
    "mnist-dit, photo-dit, mnist-unet, photo-unet, sd2, sdxl, dit-xl-2, pixart, sd3, flux, or a diffusers folder"
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
    method: Annotated[str, typer.Option("--methods", help=SYNTAX)] = "bigain-tm:0.7",
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
        table = Table(*report.columns, title=report.headline, title_justify="left")
        for row in report.rows():
            table.add_row(*row, style=None if row[1] == "kept" else "bold")
        console.print(table)


class Format(StrEnum):
    """What a denoiser is exported to."""

    onnx = "onnx"
    pt2 = "pt2"


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    format: Annotated[Format, typer.Option(help="an ONNX graph, or a package that AOTInductor compiles")] = Format.onnx,
    methods: Annotated[str, typer.Option(help=SYNTAX + "; ',' lists, a file for each")] = "bigain-tm:0.7",
    size: Annotated[int | None, typer.Option(help="side of the latent, in pixels")] = None,
    batch: Annotated[int, typer.Option(help="samples a call")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="of weights and inputs")] = Dtype.float32,
    opset: Annotated[int, typer.Option(help="of ONNX's operators, 18 to 23")] = 20,
    attention: Annotated[str, typer.Option(help="MultiHeadAttention (ONNX Runtime's), or standard")] = (
        "MultiHeadAttention"
    ),
    verify: Annotated[bool, typer.Option(help="run each ONNX file and compare it with torch")] = True,
    out: Annotated[Path, typer.Option(help="folder for the files")] = Path("bigain-export"),
) -> None:
    """Write MODEL, its attentions compressed, as an ONNX graph or an ahead-of-time compiled package."""
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
        path = out / f"{Path(model).resolve().name}-{text.replace(':', '-').replace('/', '-')}.{format}"
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


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    methods: Annotated[str, typer.Option(help=SYNTAX + "; ',' lists")] = (
        "dense,tome:0.7,bigain-tm:0.7,todo:2,bigain-td:2"
    ),
    size: Annotated[int | None, typer.Option(help="side of the latent, in pixels")] = None,
    batch: Annotated[int, typer.Option(help="samples a call")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="of weights and inputs")] = Dtype.float32,
    onnx: Annotated[str, typer.Option(help="what to time through ONNX Runtime too, likewise; '' for nothing")] = (
        "dense,bigain-tm:0.7"
    ),
    eager: Annotated[str, typer.Option(help="what to time without compiling too, likewise")] = "",
    tomesd: Annotated[str, typer.Option(help="ratios at which to time the package tomesd too; ',' lists")] = "",
    rounds: Annotated[int, typer.Option(help="interleaved timed rounds")] = 7,
    warmup: Annotated[int, typer.Option(help="rounds before those")] = 1,
    layers: Annotated[int | None, typer.Option(help="fewer of them, with random weights; all by default")] = None,
    backend: Annotated[str, typer.Option(help="torch.compile backend, or eager")] = "inductor",
    mode: Annotated[str | None, typer.Option(help="as for torch.compile; reduce-overhead takes CUDA graphs")] = None,
    out: Annotated[Path, typer.Option(help="folder for the JSON and the Markdown")] = Path("bigain-bench"),
    name: Annotated[str | None, typer.Option(help="of these files, without suffix")] = None,
    turn: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time dense against compressed, compiled, side by side, with the free bound of each kind."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's chatter would break the progress bar
    import torch

    from bigain_fx.bench import tomesd_rows
    from bigain_fx.bench.run import run
    from bigain_fx.compilers import check_works
    from bigain_fx.models import check_device, load
    from bigain_fx.passes.errors import InputError
    from bigain_fx.passes.grammar import parse_list

    parsed, exported = parse_list(methods), parse_list(onnx) if onnx else {}
    eagerly, ratios = parse_list(eager) if eager else {}, tomesd_rows.parse(tomesd)
    check_device(device)
    check_works(backend, mode)
    if name is not None and (Path(name).name != name or name in ("", "..") or "\0" in name):
        raise InputError(f"name={name!r} must be the name of a file, without folders")
    workload = load(model, size=size, batch=batch, device=device, dtype=getattr(torch, dtype), layers=layers)
    result = run(
        workload, parsed, eager=eagerly, tomesd=ratios, onnx=exported, rounds=rounds, warmup=warmup, backend=backend,
        mode=mode, out=out, name=name, turn=turn,
    )  # fmt: skip
    print(result.to_markdown())


def main() -> None:
    """Entry point: errors of ours are one line on standard error and exit status 2."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    ending_well(app)


if __name__ == "__main__":
    main()
