"""``bigain-fx evaluate``: every method on one denoiser and one data set, then a table and a figure."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from bigain_fx import embedded
from bigain_fx.demo import check_backend, make_folder
from bigain_fx.demo_report import machine
from bigain_fx.denoiser import optimize
from bigain_fx.embedded.data import data_set
from bigain_fx.embedded.features import as_bytes, load_extractor
from bigain_fx.evidence import summary
from bigain_fx.evidence.data_sets import open_data
from bigain_fx.evidence.evaluate import Evaluation, Measured, Samples, Settings
from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError, first_line
from bigain_fx.passes.methods import Methods
from bigain_fx.stopwatch import interleaved
from bigain_fx.subject import Subject, image_size, load_pipeline, open_subject

EAGER = "dense, eager"
ROUNDS = 9
INCEPTION = 2048
"""Features of Inception that torchmetrics compares, if torch-fidelity and its weights are there."""
DEFAULT = Settings()


def embedded_samples(name: str) -> Samples:
    """The held-out images of an embedded data set, ``mnist`` or ``photo``."""
    data = data_set(name)
    images, labels = data.held_out.images, data.held_out.labels.tolist()
    return Samples(name, data.classes, len(labels), lambda index: images[index], lambda index: (labels[index],))


def open_both(model: str, data: str | None, kind: str | None) -> tuple[Subject, Samples]:
    """The denoiser and the data that it is evaluated on.

    Raises:
        InputError: see :func:`open_subject` and :func:`open_data`; data that are missing, or given to a model that has
            its own.
    """
    if model in embedded.NAMES:
        if data is not None:
            raise InputError(f"data={data!r}: {model} is evaluated on its own held-out images; leave it out")
        if kind is not None:
            raise InputError(f"kind={kind!r}: {model} is evaluated on its own held-out images; leave it out")
        return open_subject(model), embedded_samples(model.split("-")[0])
    if data is None:
        raise InputError(f"data=None: name what {model} is evaluated on, such as pets, or a folder of images")
    pipe = load_pipeline(model)
    found = open_data(data, size=image_size(pipe), kind=kind)
    samples = Samples(found.name, found.classes, len(found), found.image, found.labels)
    if hasattr(pipe, "text_encoder"):
        return open_subject(model, found.prompts, pipe), samples
    names = tuple(name.split(",")[0].strip() for name in found.classes)
    subject = open_subject(model, (), pipe)  # all of its classes: in the order of the data, if they are as many
    return (subject if len(names) == len(subject.classes) else open_subject(model, names, pipe)), samples


def evaluate(
    model: str,
    methods: Mapping[str, Methods],
    out: Path,
    *,
    name: str = "report",
    work: Path | None = None,
    data: str | None = None,
    kind: str | None = None,
    images: int = 500,
    generate: int = 500,
    settings: Settings = DEFAULT,
    backend: str = "inductor",
    timed: bool = True,
) -> list[summary.Row]:
    """Measure every method and leave ``NAME.md``, ``NAME.json`` and ``NAME.png`` in ``out``.

    Args:
        model, data, kind: see :func:`open_both`.
        methods: by text, in the order of the table.
        out: for the report.
        name: of the report.
        work: keeps what was worked out, so that a run that was stopped goes on from there; None is ``out``.
        images: how many to classify.
        generate: how many to generate; 0 leaves FID out.
        settings: the same for every method.
        backend: as of :func:`bigain_fx.optimize`.
        timed: time a call of every method, in turns with the dense model, eager and compiled.

    Raises:
        InputError: see :func:`open_both` and :class:`Evaluation`.
    """
    if not checks.counts(generate, least=0, most=checks.MANY) or generate == 1:
        raise InputError(f"generate={generate!r} must be 0, or 2 or more: FID needs a covariance")
    check_backend(backend)
    subject, samples = open_both(model, data, kind)
    checks.integer("images", images, least=1, most=samples.count)
    make_folder(out)
    extractor = load_extractor(samples.name) if model in embedded.NAMES and generate else None
    evaluation = Evaluation(subject, samples, settings, work or out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    measured: dict[str, Measured] = {}
    with Progress(*columns) as progress:
        for text, given in methods.items():
            task = progress.add_task(text, total=images + generate)
            advance = partial(progress.advance, task)
            measured[text] = evaluation.measure(
                text, given, images=images, generate=generate, backend=backend, progress=advance
            )
        times = _times(evaluation, methods, backend) if timed else {}
    fids = _fids(samples, measured, extractor) if generate else {}
    labels = [samples.labels(index) for index in range(samples.count)]
    found = summary.rows(measured, methods, labels, fids, times)
    features = "Inception's" if extractor is None else f"those of {samples.name}-features, not Inception's"
    facts = {
        "model": subject.bundle.name, "data": samples.name, "classes": len(samples.classes), "images": images,
        "generated": generate, **asdict(settings), "backend": backend, "features": features, "ms": times,
        "machine": machine(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    _write(out, name, facts, found)
    Console().print(summary.to_table(found), soft_wrap=True, markup=False)
    return found


def _fids(samples: Samples, measured: Mapping[str, Measured], extractor: nn.Module | None) -> dict[str, float]:
    """FID by text, with the features of ``extractor``, or of Inception; none where its weights cannot be had."""
    real = (as_bytes(samples.image(index))[None] for index in range(samples.count))
    generated = {text: item.generated for text, item in measured.items()}
    try:
        return summary.fids(real, generated, extractor or INCEPTION)
    except (ModuleNotFoundError, OSError) as error:
        Console().print(f"no FID: Inception's weights cannot be had ({first_line(error)})", markup=False)
        return {}


def _times(evaluation: Evaluation, methods: Mapping[str, Methods], backend: str) -> dict[str, float]:
    """Milliseconds of the probe call, medians of rounds in turn."""
    model = evaluation.bundle.model
    denoisers: dict[str, Any] = {EAGER: model} | {
        text: optimize(model, method=given, backend=backend) for text, given in methods.items()
    }
    for denoiser in denoisers.values():
        evaluation.probe_call(denoiser)
    seconds = interleaved([partial(evaluation.probe_call, item) for item in denoisers.values()], ROUNDS)
    return {text: 1e3 * statistics.median(each) for text, each in zip(denoisers, seconds, strict=True)}


def _write(out: Path, name: str, facts: Mapping[str, Any], found: list[summary.Row]) -> None:
    """All files, or none; the report last."""
    title = f"{facts['model']}: {facts['images']} images of {facts['data']}"
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as staging:
        folder = Path(staging)
        summary.figure(title, found).savefig(folder / f"{name}.png", dpi=130)
        data = {**facts, "rows": [summary.to_dict(row) for row in found]}
        (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
        (folder / f"{name}.md").write_text(_markdown(title, name, facts, found))
        for file in (f"{name}.png", f"{name}.json", f"{name}.md"):
            os.replace(folder / file, out / file)


def _markdown(title: str, name: str, facts: Mapping[str, Any], found: list[summary.Row]) -> str:
    rounds = ", ".join(
        f"{pairs} pairs, {keep} kept" for pairs, keep in zip(facts["n_samples"], facts["to_keep"], strict=True)
    )
    lines = [
        f"# {title}", "",
        f"{facts['classes']} classes; rounds of {rounds}; seed {facts['seed']}; calls of {facts['batch']} rows.", "",
        summary.to_table(found),
        "*Accuracy*: 95 % Wilson interval. *Points*: over the method in *against*, on the same images and pairs, with "
        "the paired 95 % bootstrap interval. *p*: McNemar's exact test. *Agreement*: with what dense predicts.",
    ]  # fmt: skip
    if all(row.fid is not None for row in found):
        lines += [
            "", f"*FID*: {facts['generated']} images of {facts['steps']} steps, guidance {facts['guidance']:g}, "
            f"against all images of the data; the features are {facts['features']}.",
        ]  # fmt: skip
    if facts["ms"]:
        lines += [
            "", f"*ms a call*: {facts['batch']} rows, backend {facts['backend']}, median of {ROUNDS} rounds in turn; "
            f"`{EAGER}` took {facts['ms'][EAGER]:.1f} ms.",
        ]  # fmt: skip
    here = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
    return "\n".join([*lines, "", f"![accuracy and FID]({name}.png)", "", f"{here}; {facts['date']}", ""])
