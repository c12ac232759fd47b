"""What ``bigain-fx generate`` and ``bigain-fx classify`` do."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bigain_fx import pictures
from bigain_fx.classify import DiffusionClassifier
from bigain_fx.demo import check_backend, make_folder
from bigain_fx.denoiser import optimize
from bigain_fx.embedded.features import as_bytes
from bigain_fx.passes import checks
from bigain_fx.passes.methods import Methods
from bigain_fx.sample import sample
from bigain_fx.subject import open_subject


def generate(
    model: str, methods: Mapping[str, Methods], prompts: Sequence[str], *, count: int, steps: int, guidance: float,
    batch: int, seed: int, backend: str, out: Path,
) -> None:  # fmt: skip
    """Write ``count`` images of each method into ``out``, the classes in turn, from the same noise for every method.

    Raises:
        InputError: see :func:`bigain_fx.subject.open_subject` and :func:`bigain_fx.sample.sample`; ``count`` below 1.
    """
    checks.integer("count", count, least=1, most=checks.MANY)
    checks.integer("seed", seed, least=-checks.SEED, most=checks.SEED)
    check_backend(backend)
    subject = open_subject(model, prompts)
    make_folder(out)
    labels = torch.arange(count) % len(subject.classes)
    noise = torch.randn((count, *subject.bundle.sample_shape), generator=torch.Generator().manual_seed(seed))
    for text, given in methods.items():
        fast = optimize(subject.bundle.model, method=given, backend=backend)
        images = sample(fast, subject.bundle, labels, steps=steps, guidance=guidance, noise=noise, batch=batch)
        if subject.decode is not None:
            images = subject.decode(images)
        names = [
            f"{_plain(text)}-{index:04}-{_plain(subject.classes[label])}" for index, label in enumerate(labels.tolist())
        ]
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as staging:
            pictures.write(as_bytes(images), Path(staging), names)
            for name in names:
                os.replace(Path(staging) / f"{name}.png", out / f"{name}.png")
        Console().print(f"{text}: {count} images in {out}", soft_wrap=True, markup=False)


def classify(
    model: str, images: Sequence[Path], methods: Methods, prompts: Sequence[str], *, n_samples: tuple[int, ...],
    to_keep: tuple[int, ...], batch: int, seed: int, backend: str, as_json: bool,
) -> None:  # fmt: skip
    """Print the class of each image, the runner-up, and by how much the latter's error is larger.

    Raises:
        InputError: see :func:`bigain_fx.subject.open_subject`, :class:`bigain_fx.DiffusionClassifier`; an image that
            cannot be read.
    """
    check_backend(backend)
    subject = open_subject(model, prompts)
    read = torch.stack([pictures.read(path, subject.image_shape) for path in images])
    classifier = DiffusionClassifier(
        optimize(subject.bundle.model, method=methods, backend=backend), subject.bundle.scheduler,
        subject.bundle.condition(torch.arange(len(subject.classes))), n_samples=n_samples, to_keep=to_keep,
        batch=batch, seed=seed,
    )  # fmt: skip
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("denoiser calls", total=None)
        found = classifier(
            read if subject.encode is None else subject.encode(read), progress=partial(progress.advance, task)
        )
    rows = [
        {
            "image": str(path), "class": subject.classes[first], "runner-up": subject.classes[second],
            "error": float(found.errors[index, first]), "margin": margin,
        }
        for index, (path, first, second, margin) in enumerate(
            zip(images, found.predicted.tolist(), found.runner_up.tolist(), found.margin.tolist(), strict=True)
        )
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"calls": found.calls, "images": rows}, indent=1))
        return
    table = Table("image", "class", "runner-up", "error", "margin", title=f"{found.calls} denoiser calls")
    for row in rows:
        table.add_row(*(f"{value:.2e}" if isinstance(value, float) else value for value in row.values()))
    Console().print(table)


def _plain(text: str) -> str:
    """``text`` as a part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in ".+-_" else "-" for letter in text)
