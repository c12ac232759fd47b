"""What a command line names: a denoiser with its classes, ready to generate and to classify."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigain_fx import embedded
from bigain_fx.classify import encode
from bigain_fx.embedded import ClassConditional
from bigain_fx.embedded.data import CLASS_NAMES
from bigain_fx.passes.checks import told
from bigain_fx.passes.errors import InputError, first_line


@dataclass(frozen=True)
class Subject:
    """A denoiser and what is needed around it.

    Attributes:
        bundle: the denoiser, its scheduler, a condition for each class and one for none.
        classes: their names.
        image_shape: ``(C, H, W)`` of the images that it makes.
        encode, decode: images in [-1, 1] to latents and back; None where the denoiser works on pixels.
    """

    bundle: ClassConditional
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None


def open_subject(model: str, prompts: Sequence[str] = (), pipe: Any = None) -> Subject:
    """The denoiser ``model``, in eval mode on the CPU.

    Args:
        model: an embedded denoiser, or the folder of a diffusers pipeline: Stable Diffusion 1 or 2, whose classes are
            ``prompts``; or DiT, whose classes are all that it knows, or those that ``prompts`` names.
        prompts: one for each class.
        pipe: what :func:`load_pipeline` made of the folder, if it did.

    Raises:
        InputError: neither; a pipeline of another kind; prompts that are missing, or that nothing here can take.
    """
    if model in embedded.NAMES:
        if prompts:
            raise InputError(f"prompts={list(prompts)}: {model} knows its classes; leave them out")
        bundle = embedded.load(model)
        return Subject(bundle, CLASS_NAMES[model.split("-")[0]], bundle.sample_shape)
    pipe = pipe or load_pipeline(model)
    from diffusers import DiTPipeline, StableDiffusionPipeline

    if isinstance(pipe, StableDiffusionPipeline):
        return _stable_diffusion(model, pipe, prompts)
    if isinstance(pipe, DiTPipeline):
        return _dit(model, pipe, prompts)
    raise InputError(
        f"model={model!r} is a {type(pipe).__name__}; StableDiffusionPipeline and DiTPipeline can be named here, any "
        "denoiser can be given to bigain_fx.DiffusionClassifier"
    )


def image_size(pipe: Any) -> int:
    """Side of the images that a pipeline makes, in pixels.

    Raises:
        InputError: it has no denoiser of latents.
    """
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if denoiser is None or not hasattr(pipe, "vae"):
        raise InputError(f"the model is a {type(pipe).__name__}, without a denoiser of latents")
    return int(denoiser.config.sample_size) * _scale(pipe.vae)


def _scale(vae: Any) -> int:
    """Pixels of an image for one of its latent, per axis."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def load_pipeline(model: str) -> Any:
    """The diffusers pipeline in the folder ``model``.

    Raises:
        InputError: it holds none, or one that cannot be loaded.
    """
    if not os.path.isfile(Path(model) / "model_index.json"):
        raise InputError(
            f"{told('model', model)} is neither one of {', '.join(embedded.NAMES)} nor the folder of a diffusers "
            "pipeline"
        )
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(model, local_files_only=True)
    except Exception as error:  # whatever the loaders of its parts raise
        raise InputError(f"model={model!r} cannot be loaded: {first_line(error)}") from error


def _stable_diffusion(model: str, pipe: Any, prompts: Sequence[str]) -> Subject:
    if len(prompts) < 2:
        raise InputError(f"prompts={list(prompts)} must be two or more, one for each class of {model}")
    with torch.no_grad():
        tokens, _ = pipe.encode_prompt([*prompts, ""], "cpu", 1, False)
    return _latent(model, pipe, pipe.unet, tuple(prompts), class_tokens=tokens)


def _dit(model: str, pipe: Any, prompts: Sequence[str]) -> Subject:
    named: dict[str, int] = pipe.labels or {}
    number = pipe.transformer.config.num_embeds_ada_norm
    if unknown := [prompt for prompt in prompts if prompt not in named]:
        raise InputError(f"prompts={unknown[:5]} are no classes of {model}; it has {', '.join(sorted(named)[:5])} ...")
    first_name = {label: name for name, label in reversed(named.items())}
    classes = tuple(prompts) or tuple(first_name.get(label, str(label)) for label in range(number))
    labels = [named[name] for name in prompts] or list(range(number))
    return _latent(model, pipe, pipe.transformer, classes, class_labels=torch.tensor([*labels, number]))


def _latent(model: str, pipe: Any, denoiser: Any, classes: tuple[str, ...], **conditions: Tensor) -> Subject:
    side, channels = denoiser.config.sample_size, denoiser.config.in_channels
    denoiser.eval().requires_grad_(False)
    pipe.vae.eval().requires_grad_(False)
    bundle = ClassConditional(
        Path(model).resolve().name, denoiser, pipe.scheduler, (channels, side, side), len(classes), **conditions
    )
    shape = (pipe.vae.config.out_channels, side * _scale(pipe.vae), side * _scale(pipe.vae))
    return Subject(bundle, classes, shape, partial(encode, pipe.vae), partial(decode, pipe.vae))


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images ``(n, 3, H, W)`` in [-1, 1] of ``latents (n, c, h, w)``, as the denoiser makes them."""
    shifted = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    images: Tensor = vae.decode(shifted).sample
    return images.clamp(-1, 1)
