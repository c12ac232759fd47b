"""The evidence: ``python -m bigain_fx.bench.evidence`` evaluates the embedded denoisers and writes docs/evidence.md.

It takes hours on two cores, goes on where it was stopped, and several may work side by side, each on its own models.
``--quick`` runs a little of everything into another folder, in minutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import truediv
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import bigain_fx as bgx
from bigain_fx import command_line, embedded
from bigain_fx.bench import evidence_document, evidence_figures, result
from bigain_fx.bench.evidence_document import BETTER
from bigain_fx.bench.result import WHOLE, plain
from bigain_fx.embedded.data import Images, data_set
from bigain_fx.embedded.train import save_atomically
from bigain_fx.evidence import spectrum_report
from bigain_fx.evidence.evaluate import Settings
from bigain_fx.evidence.run import evaluate
from bigain_fx.passes import checks
from bigain_fx.passes.grammar import parse, parse_list
from bigain_fx.passes.methods import KVDownsample, LaplacianMerge, Methods

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "evidence"


@dataclass(frozen=True)
class Study:
    """One table for each denoiser.

    Attributes:
        name: of its files.
        models: the denoisers that it is for.
        methods: in the text grammar.
        images, generated: how many.
    """

    name: str
    models: tuple[str, ...]
    methods: str
    images: int
    generated: int


DITS = ("mnist-dit", "photo-dit")
STUDIES = (
    Study(
        "main",
        embedded.NAMES,
        f"dense,tome:0.7{WHOLE},bigain-tm:0.7{WHOLE},bigain-tm:0.7{BETTER}{WHOLE},todo:2,bigain-td:2:0.9,bigain-td:2:0",
        500,
        500,
    ),
    Study(
        "merging",
        DITS,
        f"dense,tome:0.3{WHOLE},bigain-tm:0.3{WHOLE},tome:0.5{WHOLE},bigain-tm:0.5{WHOLE},tome:0.7{WHOLE},"
        f"bigain-tm:0.7{WHOLE},bigain-tm:0.7:cell_layout=row{WHOLE},bigain-tm:0.7:window=8,bigain-tm:0.7:window=4,"
        f"bigain-tm:0.7:proportional=true{WHOLE},bigain-tm:0.7:unmerge=blend{WHOLE},bigain-tm:0.7{BETTER}{WHOLE},"
        f"tome:0.7{BETTER}{WHOLE},block-pool:0.7,block-pool:0.7{BETTER},tome:0.75{WHOLE},bigain-tm:0.75{WHOLE},"
        f"bigain-tm:0.75{BETTER}{WHOLE},bigain-tm:0.5{BETTER}{WHOLE},bigain-tm:0.3{BETTER}{WHOLE}",
        100,
        100,
    ),
    Study(
        "downsampling",
        DITS,
        "dense,todo:2,bigain-td:2:-0.25,bigain-td:2:0,bigain-td:2:0.25,bigain-td:2:0.5,bigain-td:2:0.75,bigain-td:2:0.9,"
        "bigain-td:2:1.2,bigain-td:2:1.4,bigain-td:2:0.8..1.2,bigain-td:2:1.2..0.8,bigain-td:2:0.4..-0.4,todo:4,"
        "bigain-td:4:0,bigain-td:4:0.5,bigain-td:4:0.9",
        100,
        100,
    ),
)
SPECTRA = f"tome:0.7{WHOLE},bigain-tm:0.7{WHOLE},block-pool:0.7,todo:2,bigain-td:2:0.9,bigain-td:2:0"
TIMESTEPS = (100, 500, 900)
CALIBRATED = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
RATIOS = tuple(LaplacianMerge(ratio, proportional=True, unmerge="blend", window=None) for ratio in (0.5, 0.7))
NAMES = (*(study.name for study in STUDIES), "spectrum", "calibration")
SLOW, FEWER = ("mnist-unet", "photo-unet"), (200, 100)
"""Of these at most so many images are classified and generated, and nothing is swept: on 1,024 tokens they take four
times as long."""
QUICK = tuple(replace(study, images=20, generated=20) for study in STUDIES)


def run(
    models: Annotated[str, typer.Option(help="which embedded denoisers")] = ",".join(embedded.NAMES),
    studies: Annotated[str, typer.Option(help="which tables")] = ",".join(NAMES),
    quick: Annotated[bool, typer.Option("--quick", help="a little of everything, eager")] = False,
    work: Annotated[Path, typer.Option(help="folder of what is worked out; kept, to go on from")] = Path(".evidence"),
    out: Annotated[Path, typer.Option(help="folder for the JSON files and the figures")] = RESULTS,
    document: Annotated[Path, typer.Option(help="the document")] = ROOT / "docs" / "evidence.md",
    timed: Annotated[bool, typer.Option("--time/--no-time", help="time calls too; on an idle machine")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's default")] = 0,
) -> None:
    """Measure MODELS, then write the document from all results that are there."""
    if checks.integer("threads", threads, least=0, most=1024):
        torch.set_num_threads(threads)
    if unknown := set(models.split(",")) - set(embedded.NAMES):
        names = ", ".join(embedded.NAMES)
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} is none of {names}", param_hint="--models")
    settings = Settings(n_samples=(1, 2), steps=3) if quick else Settings()
    wanted = set(studies.split(","))
    if unknown := wanted - set(NAMES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} is none of {', '.join(NAMES)}", param_hint="--studies")
    result.prepare(out)
    for model in models.split(","):
        images = 2 if quick else 16
        file = out / f"{model}-calibration.json"
        if "calibration" in wanted or not file.is_file():
            calibrate(model, images, file)
        for study in QUICK if quick else STUDIES:
            if study.name not in wanted or model not in study.models:
                continue
            Console().print(f"{model}: {study.name}")
            most = FEWER if model in SLOW else (study.images, study.generated)
            evaluate(
                model, methods_of(study, result.read(file)), out, name=f"{model}-{study.name}",
                work=work / model, images=min(study.images, most[0]), generate=min(study.generated, most[1]),
                settings=settings,
                timed=timed and study.name == "main", backend="eager" if quick else "inductor",
            )  # fmt: skip
        if "spectrum" in wanted:
            folder = out / f"{model}-spectrum"
            spectrum_report.run(model, parse_list(SPECTRA), TIMESTEPS, images=images, seed=0, out=folder)
    write(results(out), out, document)


def methods_of(study: Study, calibration: Mapping[str, Any]) -> dict[str, Methods]:
    """The methods of ``study`` by text; what is calibrated follows what it is calibrated from."""
    found: dict[str, Methods] = {}
    fitted = {plain(text): plain(item["method"]) + WHOLE for text, item in calibration["merging"].items()}
    for text, methods in parse_list(study.methods).items():
        found[text] = methods
        if (name := plain(text)) in fitted:
            found[f"calibrated {name.removesuffix(BETTER)}"] = parse(fitted[name])
    return found


def calibrate(model: str, images: int, file: Path) -> None:
    """Write the alphas and the ratios that deviate least on ``images`` training images, at :data:`CALIBRATED` steps."""
    bundle, data = embedded.load(model), data_set(model.split("-")[0])
    drawn = Images(*data.draw(images, torch.Generator().manual_seed(0)))
    calls = [spectrum_report.noised_call(bundle, drawn, step, step) for step in CALIBRATED]
    factors, merging = {}, {}
    for factor in (2, 4):
        line = bgx.calibrate(bundle.model, calls, method=KVDownsample(factor))
        constant = bgx.calibrate(bundle.model, calls, method=KVDownsample(factor), schedule=False)
        methods = {"schedule": str(line.method), "constant": str(constant.method)}
        factors[str(factor)] = methods | {name: getattr(line, name) for name in ("timesteps", "best", "deviation")}
    for method in RATIOS:
        best = bgx.calibrate(bundle.model, calls, method=method)
        relative = fmean(map(truediv, best.deviation, best.given))
        found = {"relative": [relative], "ratios": best.ratios, "tried": best.tried}
        merging[str(method)] = {"method": str(best.method), **found}
    result = {
        "model": model, "images": images, "torch": torch.__version__, "factors": factors, "merging": merging,
    }  # fmt: skip
    save_atomically(lambda path: path.write_text(json.dumps(result, indent=1) + "\n"), file)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """All results in ``folder``, by model and study: ``photo-dit-main``."""
    names = {f"{model}-{study}": f"{model}-{study}.json" for model in embedded.NAMES for study in NAMES}
    names |= {f"{model}-spectrum": f"{model}-spectrum/spectrum.json" for model in embedded.NAMES}
    files = {name: folder / path for name, path in names.items()}
    return {name: result.read(file) for name, file in files.items() if file.is_file()}


def reading(folder: Path) -> str:
    """What we make of the results in ``folder``: ``reading.md`` beside them, written by hand; empty without it."""
    file = folder / "reading.md"
    return file.read_text() + "\n" if file.is_file() else ""


def write(found: dict[str, dict[str, Any]], figures: Path, document: Path) -> None:
    """Write the document; links to figures are relative to it."""
    evidence_figures.overview(found).savefig(figures / "overview.png", dpi=130)
    if evidence_document.swept(found):
        evidence_figures.sweeps(found).savefig(figures / "sweeps.png", dpi=130)
    text = evidence_document.text(found, Path(os.path.relpath(figures, document.parent)), reading(figures))
    temporary = document.with_name(document.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, document)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    app = typer.Typer(add_completion=False)
    app.command()(run)
    command_line.ending_well(lambda: app(list(arguments) if arguments is not None else None))


if __name__ == "__main__":
    main()
