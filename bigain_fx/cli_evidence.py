"""The commands that show what compression costs: ``bigain-fx generate``, ``classify``, ``evaluate``, ``spectrum``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bigain_fx.passes.grammar import SYNTAX

app = typer.Typer()

SUBJECT_HELP = "mnist-dit, mnist-unet, photo-dit, photo-unet, or the folder of a Stable Diffusion or DiT pipeline"
PROMPTS_HELP = "one for each class, separated by '|'; of a pipeline only"


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=SUBJECT_HELP)],
    method: Annotated[str, typer.Option("--methods", help=SYNTAX)] = "dense",
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
    method: Annotated[str, typer.Option("--method", help=SYNTAX)] = "dense",
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
    methods: Annotated[str, typer.Option(help=SYNTAX + "; ',' lists")] = (
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


@app.command()
def spectrum(
    model: Annotated[str, typer.Argument(help=SUBJECT_HELP.partition(", or")[0])],
    methods: Annotated[str, typer.Option(help=SYNTAX + "; ',' lists; one method each, none joined")] = (
        "tome:0.7,bigain-tm:0.7,todo:2,bigain-td:2"
    ),
    timesteps: Annotated[str, typer.Option(help="how noisy the images are")] = "100,500,900",
    images: Annotated[int, typer.Option(help="held-out images")] = 16,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the figures and the JSON")] = Path("bigain-spectrum"),
) -> None:
    """Draw which frequencies of the features each method keeps, and what its plans merge over an image."""
    from bigain_fx.evidence import spectrum_report
    from bigain_fx.passes.grammar import parse_list

    spectrum_report.run(model, parse_list(methods), _numbers("timesteps", timesteps), images=images, seed=seed, out=out)


def _split(prompts: str) -> tuple[str, ...]:
    return tuple(prompt.strip() for prompt in prompts.split("|")) if prompts else ()


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from bigain_fx.passes.errors import InputError

    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"{name}={text!r} must be whole numbers, separated by commas, such as 5,20") from None
