"""``bigain-fx spectrum``: what each method keeps of the features' frequencies, and what its plans merge."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bigain_fx import embedded
from bigain_fx.demo import make_folder
from bigain_fx.embedded import ClassConditional
from bigain_fx.embedded.data import Images, data_set
from bigain_fx.evidence import spectrum
from bigain_fx.evidence.plans import plan_figure, plans_of
from bigain_fx.noising import Noising
from bigain_fx.passes import checks
from bigain_fx.passes.errors import InputError
from bigain_fx.passes.methods import MergeMethod, Methods

HIGH = 0.375
"""Cycles per token: what lies above is the top quarter of the frequencies."""


def run(
    model: str, methods: Mapping[str, Methods], timesteps: Sequence[int], *, images: int, seed: int, out: Path
) -> None:
    """Write ``spectrum.png``, ``spectrum.json`` and a picture of the first plan of each merge into ``out``.

    Args:
        model: an embedded denoiser.
        methods: by text, one method each.
        timesteps: of the images that are looked at.
        images: how many held-out images.
        seed: of the noise.

    Raises:
        InputError: see :func:`bigain_fx.evidence.spectrum.measure`; a model that is not embedded; a timestep or a
            number of images out of range.
    """
    checks.integer("seed", seed, least=-checks.SEED, most=checks.SEED)
    bundle = embedded.load(model)
    held_out = data_set(model.split("-")[0]).held_out
    if not 1 <= images <= len(held_out):
        raise InputError(f"images={images!r} must be between 1 and {len(held_out)}")
    last = bundle.scheduler.config.num_train_timesteps - 1
    if wrong := [step for step in timesteps if not 0 <= step <= last]:
        raise InputError(f"timesteps={wrong} must be between 0 and {last}")
    make_folder(out)
    chosen = held_out.first(images)
    inputs_at = partial(noised_call, bundle, chosen, seed)
    found = {
        text: spectrum.measure(bundle.model, inputs_at, method=given, timesteps=timesteps)
        for text, given in methods.items()
    }
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as staging:
        folder = Path(staging)
        spectrum.figure(found).savefig(folder / "spectrum.png", dpi=130)
        (folder / "spectrum.json").write_text(json.dumps(_plain(model, images, seed, found), indent=1) + "\n")
        for text, given in methods.items():
            if isinstance(given[0], MergeMethod):
                plan = plans_of(bundle.model, inputs_at(timesteps[0]), method=given[0])[0]
                name = "".join(letter if letter.isalnum() or letter in ".+-_" else "-" for letter in text)
                plan_figure(chosen.images[0], plan).savefig(folder / f"plan-{name}.png", dpi=130)
        for path in sorted(folder.iterdir()):
            os.replace(path, out / path.name)
    table = Table("method", *(f"kept, error at {step}" for step in timesteps),
                  title=f"share of the power above {HIGH:g} cycles per token, mean of attentions")  # fmt: skip
    for text, spectra in found.items():
        high = spectra.frequencies > HIGH
        cells = zip(spectra.retention[..., high].mean((1, 2)), spectra.deviation[..., high].mean((1, 2)), strict=True)
        table.add_row(text, *(f"{kept:.3f}, {lost:.3f}" for kept, lost in cells))
    Console().print(table)
    Console().print(f"figures: {out}", soft_wrap=True, markup=False)


def noised_call(bundle: ClassConditional, images: Images, seed: int, timestep: int) -> dict[str, Any]:
    """Keyword arguments of the denoiser for ``images``, noised to ``timestep``, each under its own class."""
    noise = torch.randn(images.images.shape, generator=torch.Generator().manual_seed(seed))
    noising = Noising(bundle.scheduler, (bundle.scheduler.config.num_train_timesteps - 1, 0))
    noisy, _, timesteps = noising(images.images, noise, torch.full((len(images),), timestep))
    first = "sample" if bundle.class_tokens is not None else "hidden_states"
    return {first: noisy, "timestep": timesteps, **bundle.condition(images.labels)}


def _plain(model: str, images: int, seed: int, found: Mapping[str, spectrum.Spectra]) -> dict[str, Any]:
    spectra = {
        text: {
            "sites": item.sites, "timesteps": item.timesteps, "frequencies": item.frequencies.tolist(),
            "retention": item.retention.mean(1).tolist(), "deviation": item.deviation.mean(1).tolist(),
        }
        for text, item in found.items()
    }  # fmt: skip
    return {"model": model, "images": images, "seed": seed, "torch": torch.__version__, "methods": spectra}
